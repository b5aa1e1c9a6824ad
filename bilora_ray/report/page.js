"use strict";
// Draws the charts one after the other, so that the page can be read meanwhile, and sorts tables.
{
  const { charts, rows, config } = JSON.parse(document.getElementById("drawn").textContent);
  const look = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config, tooltip: { disableDefaultStyle: true } };

  const used = (spec) => [spec, ...(spec.layer ?? [])].map((part) => part.data?.name).filter(Boolean);

  async function draw() {
    for (const place of document.querySelectorAll("[data-chart]")) {
      const { study, spec } = charts[place.dataset.chart];
      const datasets = { ...spec.datasets };
      for (const name of used(spec)) datasets[name] = rows[study][name];
      await vegaEmbed(place, { ...spec, datasets }, look);
      await new Promise((resume) => setTimeout(resume));
    }
    document.documentElement.dataset.drawn = "yes";
  }

  function order(row, column) {
    const cell = row.cells[column];
    return cell.dataset.order === undefined ? cell.textContent : Number(cell.dataset.order);
  }

  function compare(one, other) {
    // What is absent comes last, numbers before texts.
    if (one === "" || other === "") return (one === "") - (other === "");
    if (typeof one !== typeof other) return typeof one === "number" ? -1 : 1;
    return typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true });
  }

  function sort(head) {
    const body = head.closest("table").tBodies[0];
    const falling = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const sorted = [...body.rows].sort((one, other) => {
      const [a, b] = [order(one, head.cellIndex), order(other, head.cellIndex)];
      return falling && a !== "" && b !== "" ? compare(b, a) : compare(a, b);
    });
    body.append(...sorted);
  }

  for (const head of document.querySelectorAll(".sortable th")) {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        sort(head);
      }
    });
  }
  draw();
}
