retrograd.panel("samples", () => {});
