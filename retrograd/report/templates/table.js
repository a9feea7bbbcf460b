// Tokens of the page: where each lies, its text, its scores for every query.
class Table {
  constructor(data, arrays) {
    Object.assign(this, data);
    this.count = data.tokens;
    this.arrays = arrays;
    this.token = arrays.token;
    this.scores = data.labels.map((_, k) => arrays[`score-${k}`]);
    this.pieces = new Map();  // by document: pieces [first token, last token + 1, row, position of the first]
    arrays.start.forEach((start, k) => {
      const stop = k + 1 < arrays.start.length ? arrays.start[k + 1] : this.count, document = arrays.document[k];
      if (!this.pieces.has(document)) this.pieces.set(document, []);
      this.pieces.get(document).push([start, stop, arrays.row[k], arrays.first[k]]);
    });
    this.texts = new Map();
  }
  isTarget(place) { return (this.arrays.target[place >> 3] >> (place & 7)) & 1; }
  score(column, place) {
    const part = this.scores[column][place] / 32767;
    return part * Math.abs(part) * this.largest[column];
  }
  piece(place) {  // the piece that a token lies in
    let low = 0, high = this.arrays.start.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (this.arrays.start[middle] <= place) low = middle; else high = middle - 1; }
    return low;
  }
  documentOf(place) { return this.arrays.document[this.piece(place)]; }
  text(document) {
    if (!this.texts.has(document)) {
      const parts = [];
      for (const [start, stop] of this.pieces.get(document) ?? []) for (let k = start; k < stop; k++) parts.push(this.vocabulary[this.token[k]]);
      this.texts.set(document, parts.join(""));
    }
    return this.texts.get(document);
  }
  largestIn(column, document) {
    let most = 0;
    for (const [start, stop] of this.pieces.get(document) ?? []) for (let k = start; k < stop; k++) most = Math.max(most, Math.abs(this.scores[column][k]));
    return (most / 32767) ** 2 * this.largest[column];
  }
  heat(column, document, limit, lit = null) {  // the document's tokens, coloured by score
    const { element, signed, meaning, colour } = retrograd, spans = [];
    for (const [start, stop, row, first] of this.pieces.get(document) ?? []) {
      for (let k = start; k < stop; k++) {
        const value = this.score(column, k), where = `row ${row}, position ${first + k - start}`;
        const told = this.isTarget(k) ? `${signed(value)}, ${meaning(value)} (${where})` : `no target: nothing predicts it (${where})`;
        spans.push(element("span", { style: `background:${colour(value, limit)}`, title: told, class: lit && lit[k] ? "lit" : null, "data-score": this.scores[column][k] }, this.vocabulary[this.token[k]]));
      }
    }
    return element("div", { class: "heat" }, ...spans);
  }
}
retrograd.scaleOf = (limit) => retrograd.element("span", { class: "scale" }, `−${retrograd.number(limit)} negative: training on this lowers the query loss`, retrograd.element("span", { class: "bar" }), `+${retrograd.number(limit)} positive: training on this raises it`);
