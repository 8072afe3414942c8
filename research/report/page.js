// Shows the point of a chart that is nearest to the pointer: its step and value.
for (const chart of document.querySelectorAll("svg.chart")) {
  const points = JSON.parse(chart.dataset.points); // [x, y, step, value] in the drawing's units
  const tip = chart.parentElement.querySelector(".tip");
  const hover = chart.querySelector(".hover");
  const rule = chart.querySelector(".rule");
  const mark = chart.querySelector(".mark");
  const { height } = chart.viewBox.baseVal;

  const nearest = (x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

  const show = (event) => {
    const box = chart.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    const [x, y, step, value] = nearest(at);
    for (const [name, number] of [["x1", x], ["x2", x], ["y1", 14], ["y2", height - 34]]) {
      rule.setAttribute(name, number);
    }
    mark.setAttribute("cx", x);
    mark.setAttribute("cy", y);
    hover.style.visibility = "visible";
    tip.textContent = `step ${step}: ${value}`;
    tip.hidden = false;
  };
  const hide = () => {
    hover.style.visibility = "hidden";
    tip.hidden = true;
  };
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerdown", show);
  chart.addEventListener("pointerleave", hide);
}
