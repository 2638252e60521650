// Draws interactive figures with the book's own copy of plotly, in the colours of the page, and again when they change.
(() => {
  const assets = new URL("../_assets/", document.currentScript.src);
  const places = () => [...document.querySelectorAll(".nc-plotly")];

  const themed = () => {
    const style = getComputedStyle(document.querySelector("table, h1") || document.body), line = "rgba(128,136,146,.28)";
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
    const clear = "rgba(0,0,0,0)", modebar = { bgcolor: clear, color: "rgba(128,136,146,.8)", activecolor: style.color };
    return { paper_bgcolor: clear, plot_bgcolor: clear, font: { color: style.color, family: style.fontFamily }, modebar, axis };
  };

  const colorway = ["#3b7dd8", "#d9822b", "#2f9e6e", "#c2508f", "#7b61c9", "#b59a1f", "#20a0b5"];  // as in the drawn figures

  const draw = (place) => {
    const figure = JSON.parse(place.querySelector("script").textContent);
    const { axis, ...look } = themed(), layout = { colorway, ...figure.layout, ...look, autosize: true, font: { ...(figure.layout || {}).font, ...look.font } };
    delete layout.width;
    for (const key of new Set([...Object.keys(layout), "xaxis", "yaxis"]))
      if (/^[xy]axis\d*$/.test(key)) layout[key] = { ...layout[key], ...axis };
    let drawing = place.querySelector(".nc-drawing");
    if (!drawing) {
      drawing = document.createElement("div");
      drawing.className = "nc-drawing";
      place.append(drawing);
    }
    window.Plotly.react(drawing, figure.data || [], layout, { displaylogo: false, responsive: true });
  };

  document.addEventListener("DOMContentLoaded", () => {
    if (!places().length) return;
    const script = document.createElement("script");
    script.src = new URL("plotly.js", assets);
    script.onload = () => {
      places().forEach(draw);
      new MutationObserver(() => places().forEach(draw)).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    };
    document.head.append(script);
  });
})();
