"use strict";
// The frame: panels register a function, which is called with its section of the page and its data.
const retrograd = (() => {
  const makers = {}, tables = {};
  const panel = (name, make) => { makers[name] = make; };
  const json = (root) => JSON.parse(root.querySelector(":scope > script.data").textContent);

  // ---- text and elements ----
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, does] of Object.entries(value)) made.addEventListener(event, does);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }
  function number(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = value === 0 || (size >= 1e-3 && size < 1e5) ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
    return text.replaceAll("-", "−");
  }
  const signed = (value, digits = 3) => (value > 0 ? "+" : "") + number(value, digits);
  const percent = (share, digits = 1) => (100 * share).toFixed(digits) + " %";
  const meaning = (value) => value < 0 ? "negative: training on this lowers the query loss" : value > 0 ? "positive: training on this raises the query loss" : "zero";
  const colour = (value, limit) => {
    const part = limit > 0 ? Math.min(1, Math.abs(value) / limit) : 0;
    return value ? `rgba(var(--${value < 0 ? "negative" : "positive"}), ${(0.75 * part).toFixed(3)})` : "transparent";
  };

  // ---- arrays: base64 → deflate → numbers ----
  const kinds = { int16: Int16Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, uint8: Uint8Array, float64: Float64Array, float32: Float32Array };
  async function array(script) {
    const text = script.textContent, size = 1 << 20;
    const bytes = new ReadableStream({
      start() { this.at = 0; },
      pull(controller) {
        if (this.at >= text.length) { controller.close(); return; }
        const part = atob(text.slice(this.at, this.at + size)), found = new Uint8Array(part.length);
        for (let k = 0; k < part.length; k++) found[k] = part.charCodeAt(k);
        this.at += size;
        controller.enqueue(found);
      },
    });
    const whole = await new Response(bytes.pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
    script.remove();  // the text is not needed again
    return new kinds[script.dataset.type](whole);
  }
  async function arrays(root) {
    const found = {};
    for (const script of root.querySelectorAll(":scope > script[data-name]")) found[script.dataset.name] = await array(script);
    return found;
  }
  function table(name) {
    tables[name] ??= (async () => {
      const root = document.getElementById(name);
      return new Table(json(root), await arrays(root));
    })();
    return tables[name];
  }

  // ---- the query switch of a section ----
  class Section {
    constructor(root) { this.root = root; this.query = 0; this.listeners = []; this.select = root.querySelector(".switch select"); }
    offer(columns) {
      if (columns.length < 2 || this.select.options.length) return;
      columns.forEach((name, k) => this.select.append(element("option", { value: k }, name)));
      this.select.parentElement.hidden = false;
      this.select.addEventListener("change", () => { this.query = Number(this.select.value); this.listeners.forEach((does) => does(this.query)); });
    }
    each(does) { this.listeners.push(does); does(this.query); }  // now, and at every switch
  }

  function theme() {
    const root = document.documentElement;
    document.getElementById("theme").addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      document.dispatchEvent(new Event("theme"));
    });
  }
  function reach() {  // what scrolls can be scrolled by keyboard
    const all = [...document.querySelectorAll(".scroll")], mark = (one) => one.scrollWidth > one.clientWidth || one.scrollHeight > one.clientHeight ? one.setAttribute("tabindex", "0") : one.removeAttribute("tabindex");
    all.forEach(mark);
    const seen = new ResizeObserver((entries) => entries.forEach((entry) => mark(entry.target.closest(".scroll"))));
    all.forEach((one) => { seen.observe(one); if (one.firstElementChild) seen.observe(one.firstElementChild); });
  }
  async function start() {
    theme();
    const waiting = [];
    for (const subject of document.querySelectorAll("section.subject")) {
      const section = new Section(subject);
      for (const root of subject.querySelectorAll("section.panel")) {
        const data = json(root);
        if (data.columns) section.offer(data.columns);
        waiting.push(makers[root.dataset.panel]?.(root, data, section));
      }
    }
    await Promise.all(waiting);
    reach();
    document.documentElement.dataset.ready = "yes";
  }
  return { panel, start, element, number, signed, percent, meaning, colour, table, arrays };
})();
