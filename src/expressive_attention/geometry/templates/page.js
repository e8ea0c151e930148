// ---- state: the choices, which the address holds as well ----
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const value = id => $(id).selectedIndex;
const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)"), paper = matchMedia("print");
const isDark = () => !paper.matches && (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
const SIDES = data.models.length > 1 ? [0, 1] : [0];
const SHARED = ["layer", "head", "example", "query", "measure"], MODELS = SIDES.map(side => `model-${side}`);
const SIGNED = {
  light: [[0, "#00182b"], [.15, "#004d80"], [.35, "#3f9bd6"], [.5, "#ffffff"], [.65, "#ffe3a3"], [.85, "#f5b32c"], [1, "#d98200"]],
  dark: [[0, "#b5dcff"], [.15, "#6dbcf5"], [.35, "#20618f"], [.5, "#17191c"], [.65, "#6b4a12"], [.85, "#e09d2c"], [1, "#ffd083"]],
};
const COLORS = {expressive: ["#0072B2", "#3fa3e0"], squared: ["#009E73", "#2bc598"], softmax: ["#D55E00", "#f07f2e"]};
const TEXT_MAP = $("text-map").textContent;

const model = side => data.models[value(`model-${side}`)];
const layer = side => { const layers = model(side).layers; return layers[Math.min(value("layer"), layers.length - 1)]; };
const head = side => Math.min(value("head"), layer(side).heads - 1);
const example = side => Math.min(value("example"), layer(side).query.shape[0] - 1);
const named = each => each.name || "(the model)";
const words = i => (data.tokens[value("example")] ?? [])[i];
const token = i => words(i) === undefined ? `${i}` : `${i} ${words(i)}`;
const escaped = text => text.replace(/[&<>]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[c]);

function options(id, names) {
  const before = $(id).selectedIndex;
  $(id).replaceChildren(...names.map((name, i) => new Option(name, i)));
  $(id).selectedIndex = before >= 0 && before < names.length ? before : 0;
}
function choices() {
  const most = count => Math.max(...SIDES.map(count)), numbers = count => Array.from({length: count}, (_, i) => i);
  const longest = SIDES.reduce((a, b) => model(b).layers.length > model(a).layers.length ? b : a);
  options("layer", model(longest).layers.map(named));
  options("head", numbers(most(side => layer(side).heads)));
  options("example", numbers(most(side => layer(side).query.shape[0])));
  options("query", numbers(most(side => layer(side).query.shape[2])).map(token));
  for (const side of SIDES) {
    const each = layer(side), kept = Math.max(each.query.shape[2], each.key.shape[2]);
    $(`about-${side}`).textContent = `${named(each)}.head.${head(side)}: ${data.forms[each.form]}`
      + (kept < each.seen ? `; of ${each.seen} tokens, maps show the first ${kept}` : "") + (each.query.factors ? "; vectors to 8 bits" : "");
    for (const name of document.querySelectorAll(`.model-${side}`)) name.textContent = model(side).name;
  }
}
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const id of [...MODELS, ...SHARED]) {  // in this order: what a choice offers depends on those before it
    const at = Number(asked.get(id));
    if (asked.has(id) && $(id).options[at]) { $(id).selectedIndex = at; choices(); }
  }
}
function writeAddress() {
  const address = new URLSearchParams([...MODELS, ...SHARED].map(id => [id, value(id)]));
  try { history.replaceState(null, "", `#${address}`); } catch { /* a page inside another one has no address */ }
}

// ---- pictures ----
let library = null;
const now = [];  // attention of the chosen head, by side
const color = name => getComputedStyle(root).getPropertyValue(`--${name}`).match(/light-dark\((.*?),\s*(.*?)\)/).slice(1)[Number(isDark())];
function plot(id, label, traces, layout) {
  $(id).setAttribute("role", "img");
  $(id).setAttribute("aria-label", label);
  const lines = {gridcolor: color("rule"), zerolinecolor: color("rule"), linecolor: color("muted")};
  library.react(id, traces, {
    margin: {l: 60, r: 15, t: 10, b: 45}, showlegend: false, font: {size: 12, color: color("ink")},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: {bgcolor: color("paper"), font: {color: color("ink")}},
    ...layout, xaxis: {...lines, ...layout.xaxis}, yaxis: {...lines, ...layout.yaxis},
  }, {displayModeBar: false, responsive: true});
}
const whole = count => count > 20 ? undefined : 1;  // tick spacing of an axis of whole numbers
function ticks(count, room) {  // tokens, as many as there is room for
  const step = Math.max(1, Math.ceil(count / room)), at = [];
  for (let i = 0; i < count; i += step) at.push(i);
  const short = text => text.replaceAll("\n", "\u21b5").replaceAll(" ", "\u2423").slice(0, 9);
  return {tickvals: at, ticktext: at.map(i => words(i) === undefined ? `${i}` : escaped(short(words(i)))), tickfont: {size: 11}};
}
function box(x0, x1, y0, y1) {
  return {type: "rect", x0, x1, y0, y1, line: {color: color("chosen"), width: 2}};
}
function drawHeads() {
  const name = $("measure").selectedOptions[0].textContent, isShare = data.shares.includes(name);
  const said = data.measures[name];
  $("text-heads").textContent = `${said[0].toUpperCase()}${said.slice(1)}. ${isShare ? "The scale is from 0 to 1. " : ""}Click to choose a head.`;
  const all = SIDES.flatMap(side => model(side).layers.flatMap(each => each.measures[name])).filter(Number.isFinite);
  for (const side of SIDES) {
    const layers = model(side).layers, at = layers.indexOf(layer(side));
    plot(`heads-${side}`, `${name} of each head of ${model(side).name}`, [{
      type: "heatmap", z: layers.map(each => each.measures[name]), y: layers.map(each => escaped(named(each))), colorscale: "Cividis",
      zmin: isShare ? 0 : Math.min(...all), zmax: isShare ? 1 : Math.max(...all),
      hovertemplate: "%{y}, head %{x}: %{z:.4g}<extra></extra>", colorbar: {thickness: 12},
    }], {
      yaxis: {autorange: "reversed", automargin: true, dtick: whole(layers.length)}, xaxis: {title: {text: "head"}, dtick: whole(layer(side).heads)},
      shapes: [box(head(side) - .5, head(side) + .5, at - .5, at + .5)],
    });
  }
}
function drawAngles() {
  const shares = counts => { const total = counts.reduce((x, y) => x + y, 0) || 1; return counts.map(count => count / total); };
  const edges = data.edges, middle = edges.slice(0, -1).map(x => x + (edges[1] - edges[0]) / 2);
  const found = SIDES.map(side => ({pairs: shares(layer(side).pairs[head(side)]), mass: shares(layer(side).mass[head(side)])}));
  const top = Math.max(...found.flatMap(each => [...each.pairs, ...each.mass]), ...SIDES.flatMap(side => layer(side).random ?? []));
  for (const side of SIDES) {
    const traces = [
      {type: "bar", x: middle, y: found[side].pairs, name: "pairs", marker: {color: isDark() ? "#5a5e63" : "#cccccc"}},
      {x: middle, y: found[side].mass, name: "attention", mode: "lines", line: {shape: "hvh", color: COLORS[layer(side).form][Number(isDark())], width: 2}},
    ];
    if (layer(side).random) traces.push({x: middle, y: layer(side).random, name: "random directions", mode: "lines", line: {dash: "dot", color: color("ink"), width: 1.5}});
    // Above the curves there is room for the legend.
    plot(`angles-${side}`, `Angles of query and key of ${model(side).name}`, traces, {
      bargap: 0, showlegend: true, legend: {x: 0, y: 1, bgcolor: "rgba(0,0,0,0)"},
      xaxis: {title: {text: "cos of query and key"}, range: [-1, 1]}, yaxis: {title: {text: "share"}, range: [0, 1.3 * top]},
    });
  }
}
const relative = found => found.a.map((row, i) => { const most = Math.max(...row) || 1; return row.map((a, j) => a / most * Math.sign(found.z[i][j])); });
function drawMap() {
  for (const side of SIDES) {
    now[side] = scored(layer(side), example(side), head(side));
    drawRow(side);
  }
}
function drawRow(side) {
  const {a} = now[side], i = Math.min(value("query"), a.length - 1);
  plot(`map-${side}`, `Attention of ${model(side).name}, ${named(layer(side))}, head ${head(side)}`, [{
    type: "heatmap", z: relative(now[side]), zmin: -1, zmax: 1, colorscale: SIGNED[isDark() ? "dark" : "light"], hoverinfo: "none",
    colorbar: {thickness: 12, tickvals: [-1, 0, 1], ticktext: ["1, z < 0", "0", "1, z > 0"].map(escaped)},
  }], {
    yaxis: {autorange: "reversed", automargin: true, title: {text: "query"}, ...ticks(a.length, $(`map-${side}`).clientHeight / 13)},
    xaxis: {automargin: true, title: {text: "key"}, ...ticks(a[0].length, $(`map-${side}`).clientWidth / 18)},
    shapes: [box(-.5, a[0].length - .5, i - .5, i + .5)],
  });
}
function drawKeys() {
  const reach = Math.max(...now.flatMap(each => each.lengths));
  for (const side of SIDES) {
    const found = now[side], i = Math.min(value("query"), found.a.length - 1), a = found.a[i];
    const shown = a.map((_, j) => j).filter(j => a[j] > 0), tone = j => Number(isDark()) + 2 * Number(found.z[i][j] < 0);
    plot(`keys-${side}`, `Keys of query ${token(i)} of ${model(side).name}`, [{
      mode: "markers+text", x: shown.map(j => found.cos[i][j]), y: shown.map(j => found.lengths[j]),
      text: shown.map(j => a[j] >= .1 ? escaped(token(j)) : ""), textposition: "top center",
      hovertext: shown.map(j => `key ${escaped(token(j))}<br>attention ${a[j].toFixed(3)}, z ${found.z[i][j].toFixed(2)}`),
      hovertemplate: "%{hovertext}<extra></extra>",
      marker: {size: shown.map(j => 3 + 40 * Math.sqrt(a[j])), color: shown.map(j => ["#E69F00", "#f5b32c", "#56B4E9", "#56B4E9"][tone(j)]),
               symbol: shown.map(j => found.z[i][j] < 0 ? "square" : "circle"), line: {color: color("ink"), width: .7}, opacity: .8},
    }], {xaxis: {title: {text: "cos of query and key"}, range: [-1.1, 1.1]}, yaxis: {title: {text: "|k|"}, range: [0, 1.15 * reach]}});
  }
}

// ---- thumbnails: one canvas a head, drawn a layer at a time ----
const MOST = 64;  // tokens of a thumbnail
let round = 0;
function channels(scale, at) {  // [r, g, b] at -1 to 1
  const x = (at + 1) / 2, upper = Math.max(1, scale.findIndex(([place]) => place >= x));
  const [[from, low], [to, high]] = [scale[upper - 1], scale[upper]], share = (x - from) / (to - from);
  const part = (text, k) => parseInt(text.slice(1 + 2 * k, 3 + 2 * k), 16);
  return [0, 1, 2].map(k => part(low, k) + share * (part(high, k) - part(low, k)));
}
async function drawThumbs() {
  const mine = ++round, scale = SIGNED[isDark() ? "dark" : "light"];
  document.body.setAttribute("aria-busy", "true");
  for (const side of SIDES) {
    $(`thumbs-${side}`).replaceChildren(...model(side).layers.map((each, at) => {
      const row = document.createElement("div"), label = document.createElement("span");
      label.textContent = named(each);
      row.append(label, ...Array.from({length: each.heads}, (_, i) => {
        const button = document.createElement("button");
        button.type = "button";
        button.title = `${named(each)}, head ${i}`;
        button.setAttribute("aria-label", button.title);
        button.append(document.createElement("canvas"));
        button.addEventListener("click", () => { $("layer").selectedIndex = at; choices(); $("head").selectedIndex = i; draw(); });
        return button;
      }));
      return row;
    }));
  }
  press();
  for (const side of SIDES) {
    for (const [at, each] of model(side).layers.entries()) {
      if (!paper.matches) await new Promise(requestAnimationFrame);  // printing waits for no frame
      if (mine !== round) return;  // another choice came first
      [...$(`thumbs-${side}`).children[at].querySelectorAll("canvas")].forEach((canvas, i) => {
        const shares = relative(scored(each, Math.min(value("example"), each.query.shape[0] - 1), i, MOST));
        [canvas.width, canvas.height] = [shares[0].length, shares.length];
        const picture = canvas.getContext("2d").createImageData(canvas.width, canvas.height);
        shares.flat().forEach((share, k) => picture.data.set([...channels(scale, share), 255], 4 * k));
        canvas.getContext("2d").putImageData(picture, 0, 0);
      });
    }
  }
  document.body.setAttribute("aria-busy", "false");
}
function press() {  // marks the chosen head
  for (const side of SIDES) {
    const at = model(side).layers.indexOf(layer(side));
    [...$(`thumbs-${side}`).children].forEach((row, k) => row.querySelectorAll("button").forEach((button, i) =>
      button.setAttribute("aria-pressed", String(k === at && i === head(side)))));
  }
}

// ---- the page ----
function draw() { choices(); writeAddress(); drawHeads(); drawAngles(); drawMap(); drawKeys(); press(); }
function drawAll() { draw(); return drawThumbs(); }
function chooseQuery() { writeAddress(); for (const side of SIDES) drawRow(side); drawKeys(); }
function themed() { $("theme").textContent = isDark() ? "Light" : "Dark"; if (library) drawAll(); }
function connect() {
  for (const id of ["layer", "head"]) $(id).addEventListener("change", draw);
  for (const id of ["example", ...MODELS]) $(id).addEventListener("change", drawAll);
  $("measure").addEventListener("change", () => { writeAddress(); drawHeads(); });
  $("query").addEventListener("change", chooseQuery);
  addEventListener("hashchange", () => { readAddress(); drawAll(); });
  for (const side of SIDES) {
    $(`heads-${side}`).on("plotly_click", event => {
      const [y, x] = event.points[0].pointIndex;
      $("layer").selectedIndex = y; choices(); $("head").selectedIndex = x; draw();
    });
    $(`map-${side}`).on("plotly_click", event => { $("query").selectedIndex = event.points[0].pointIndex[0]; chooseQuery(); });
    $(`map-${side}`).on("plotly_hover", event => {
      const [i, j] = event.points[0].pointIndex;
      const said = SIDES.filter(each => i < now[each].a.length && j < now[each].a[i].length).map(each =>
        `${model(each).name}: attention ${now[each].a[i][j].toFixed(3)}, z ${now[each].z[i][j].toFixed(2)}, cos ${now[each].cos[i][j].toFixed(2)}`);
      $("text-map").textContent = `query ${token(i)}, key ${token(j)}. ${said.join("; ")}`;
    });
    $(`map-${side}`).on("plotly_unhover", () => { $("text-map").textContent = TEXT_MAP; });
  }
}
const forms = new Set(data.models.flatMap(each => each.layers.map(one => one.form)));
$("look").textContent = "Look for blue: attention on keys that point away from the query (z < 0). "
  + (forms.has("expressive") && forms.has("softmax") ? "EA attends to such keys as to those that point along it; DPA gives them next to nothing. " : "")
  + "Choose a head by its picture" + (SIDES.length > 1 ? ": the choice holds for both sides." : ".");
if (SIDES.length === 1) document.querySelector("main").className = "single";
for (const id of MODELS) options(id, data.models.map(each => each.name));
if (SIDES.length > 1) {  // EA and DPA, where both are there
  const pair = ["expressive", "softmax"].map(form => data.models.findIndex(each => each.layers[0].form === form));
  for (const side of SIDES) $(`model-${side}`).selectedIndex = pair.includes(-1) ? side : pair[side];
}
options("measure", Object.keys(data.measures));
choices();
$("query").selectedIndex = $("query").options.length - 1;
readAddress();
$("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; themed(); });
for (const media of [system, paper]) media.addEventListener("change", themed);
themed();
plotly.then(found => {
  library = found;
  if (library === null) { $("look").textContent = "This browser is too old to unpack the plots: any of 2024 or later shows them."; return; }
  const done = drawAll();
  connect();
  return done;
});
