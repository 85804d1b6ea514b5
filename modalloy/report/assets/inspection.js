const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const CONFIG = {displaylogo: false, responsive: true, plotlyServerURL: "",
                modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};
const AXIS = {gridcolor: "#edf2f7", linecolor: "#cbd5e0", zerolinecolor: "#cbd5e0", ticks: "outside", tickcolor: "#cbd5e0",
              automargin: true};
function drawn(figure, view) {
  const layout = structuredClone({font: {family: "system-ui, sans-serif", size: 12, color: "#1a202c"},
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
    margin: {l: 60, r: 45, t: 76, b: 50}, modebar: {orientation: "v"},
    legend: {orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top"}, ...figure.layout});
  for (const [path, value] of Object.entries(structuredClone(view.layout))) {
    const [name, part] = path.split(".");
    if (part) layout[name] = {...layout[name], [part]: value}; else layout[name] = value;
  }
  for (const name of Object.keys(layout)) if (/^[xy]axis/.test(name)) layout[name] = {...AXIS, ...layout[name]};
  return layout;
}
FIGURES.forEach((figure, index) => {
  const section = document.getElementById("figure-" + index), plot = section.querySelector(".plot");
  const selects = [...section.querySelectorAll("select")];
  const draw = () => {
    const view = figure.views[selects.map(select => select.value).join("|")]
      || {data: [], layout: {annotations: [{text: "this layer has no such merged weight", showarrow: false,
          x: 0.5, y: 0.5, xref: "paper", yref: "paper"}]}};
    Plotly.react(plot, structuredClone(view.data), drawn(figure, view), CONFIG);
  };
  selects.forEach(select => select.addEventListener("change", draw));
  draw();
});
