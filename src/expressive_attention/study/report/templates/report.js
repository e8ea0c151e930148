"use strict";
const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

// ---- figures ----
const inTheme = (_, value) => typeof value === "string" && isDark() ? DARK[value.toLowerCase()] ?? value : value;
async function draw(target) {
  const library = await plotly;
  if (library === null) { root.classList.add("plain"); return; }
  target.content ??= target.querySelector("script").textContent;
  const { data, layout } = JSON.parse(target.content, inTheme);
  if (!target.classList.contains("js-plotly-plot")) target.replaceChildren();
  await library.react(target, data, layout, { displayModeBar: false, responsive: true });
  target.setAttribute("aria-busy", "false");  // plotly draws in steps, with frames between
}
// A page of many plots opens at once if it draws only those in sight.
const inSight = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    inSight.unobserve(target);
    draw(target);
  }
}, { rootMargin: "400px" });
const plots = document.querySelectorAll(".plotly-graph-div");
for (const plot of plots) inSight.observe(plot);

// ---- what is wider than the page says so ----
const widths = new ResizeObserver(entries => {
  for (const { target } of entries) target.classList.toggle("wider", target.scrollWidth > target.clientWidth + 1);
});
for (const box of document.querySelectorAll(".scroll")) widths.observe(box);

// ---- theme ----
const theme = document.getElementById("theme");
function themed() {
  theme.textContent = isDark() ? "Light" : "Dark";
  for (const plot of plots) if (plot.content) draw(plot);
}
theme.hidden = false;
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; themed(); });
system.addEventListener("change", themed);
themed();

// ---- tables: numbers by their value, texts by the alphabet; cells without a number come last ----
function sort(table, column, sign) {
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || sign * a.localeCompare(b, undefined, { numeric: true });
    return sign * (x - y);
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].map(row => [key(row), row]).sort((a, b) => compare(a[0], b[0])).map(pair => pair[1]));
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement("button");
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const isDown = cell.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      sort(table, column, isDown ? -1 : 1);
    });
  });
}
