retrograd.panel("exam", () => {});
