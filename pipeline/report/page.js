"use strict";
(() => {
  // ---- a page of a run that goes on: read again, at the same place, with the same parts unfolded
  const every = Number(document.body.dataset.every || 0), written = Number(document.body.dataset.written || 0);
  const place = "raylign " + location.pathname;
  const keep = (() => { try { return window.sessionStorage; } catch { return null; } })(); // forbidden in some browsers for files
  const folds = () => [...document.querySelectorAll("details[id]")];
  try {
    const kept = JSON.parse(keep?.getItem(place) || "null");
    if (kept && every) {
      folds().forEach(f => { if (f.id in kept.open) f.open = kept.open[f.id]; });
      requestAnimationFrame(() => window.scrollTo(0, kept.y));
    }
  } catch { /* what another page has left there */ }
  addEventListener("pagehide", () => {
    try { keep?.setItem(place, JSON.stringify({ y: scrollY, open: Object.fromEntries(folds().map(f => [f.id, f.open])) })); } catch { /* full */ }
  });
  if (every) {
    const said = document.getElementById("written"), first = said.textContent;
    const again = () => {
      const age = Date.now() / 1000 - written;
      if (age > 20 * every) said.textContent = first + " That was " + Math.round(age / 60) + " minutes ago: its process may be gone; `raylign status` knows.";
      // not while it is hidden, or something is being marked; and of a run that is gone only now and then
      const busy = document.hidden || !getSelection().isCollapsed;
      if (busy || (age > 20 * every && Math.random() > .1)) setTimeout(again, every * 1000);
      else location.reload();
    };
    setTimeout(again, every * 1000);
  }
  // a link to a stage unfolds it
  const unfold = () => { const f = document.getElementById(decodeURIComponent(location.hash.slice(1))); if (f instanceof HTMLDetailsElement) { f.open = true; f.scrollIntoView(); } };
  addEventListener("hashchange", unfold); if (location.hash) unfold();

  // ---- charts
  const held = document.getElementById("figures");
  if (!held) return;
  const figures = JSON.parse(held.textContent);
  const colour = name => { // a custom property as the browser resolves it, light or dark
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(--${name})`;
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  const theme = () => {
    const [text, dim, line] = ["text", "dim", "line"].map(colour), font = "system-ui, sans-serif";
    const axis = { labelColor: dim, titleColor: dim, gridColor: line, domain: false, ticks: false, labelFont: font, titleFont: font, labelFontSize: 11, titleFontSize: 12, titleFontWeight: 400, labelPadding: 6, titlePadding: 10 };
    return { background: null, font, padding: 2, autosize: { type: "fit-x", contains: "padding" }, axis, axisX: { domain: true, domainColor: line }, view: { stroke: null }, rule: { color: dim }, text: { color: text, font }, range: { category: [0, 1, 2, 3, 4, 5, 6, 7].map(i => colour("c" + i)) } };
  };
  const rows = data => data.rows || data.lines.flatMap(l => l.x.map((x, i) => ({ k: l.k, held_out: l.held_out, few: l.few, x, y: l.y[i] })));
  const shown = (value, unit) => {
    if (unit === "share") return (100 * value).toFixed(1) + "%";
    if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  };
  const tip = (handler, event, item, value) => {
    document.querySelector(".tip")?.remove();
    if (value == null || value === "") return;
    const box = document.body.appendChild(document.createElement("div"));
    box.className = "tip"; box.textContent = value.says ?? value;
    box.style.left = Math.min(event.clientX + 12, innerWidth - box.offsetWidth - 8) + "px"; box.style.top = event.clientY + 14 + "px";
  };
  const drawn = new Map(); // element -> {view, figure, steps, keys, last}
  const draw = element => {
    const figure = figures[element.dataset.figure], plot = element.querySelector(".plot"); // its label is read aloud; Vega would write over it, so it draws within
    drawn.get(element)?.view?.finalize();
    const spec = { ...figure.spec, data: { values: rows(figure.data) } };
    const keys = [...element.querySelectorAll(".key")].map(k => ({ line: figure.data.lines?.find(l => l.k === k.dataset.key), output: k.querySelector("output") })).filter(k => k.line && k.output);
    const steps = [...new Set(keys.flatMap(k => k.line.x))].sort((a, b) => a - b);
    const chart = { figure, steps, keys, said: element.querySelector(".at"), last: drawn.get(element)?.last || keys.map(k => k.output.textContent) };
    drawn.set(element, chart);
    return window.vegaEmbed(plot.firstElementChild, spec, { mode: "vega-lite", renderer: "svg", actions: false, tooltip: tip, config: theme() }).then(made => {
      chart.view = made.view;
    });
  };
  const nearest = (steps, x) => steps.reduce((best, s) => (Math.abs(s - x) < Math.abs(best - x) ? s : best), steps[0]);
  const point = (chart, x) => { // the values at a step, in all of them or, without one, the last
    const at = x == null ? null : nearest(chart.steps, x);
    chart.keys.forEach((k, i) => {
      const j = at == null ? -1 : k.line.x.indexOf(at);
      k.output.textContent = at == null ? chart.last[i] : j < 0 ? "–" : shown(k.line.y[j], chart.figure.unit);
    });
    chart.said.textContent = at == null ? "" : "step " + at.toLocaleString("en");
    chart.view?.signal("at", at).runAsync();
  };
  let due = 0;
  const follow = (element, x) => { // every chart of the same stage shows the same step
    cancelAnimationFrame(due);
    due = requestAnimationFrame(() => { const group = drawn.get(element).figure.group; drawn.forEach(c => { if (c.figure.group === group && c.steps.length) point(c, x); }); });
  };
  const under = (chart, event) => chart.view.scale("x").invert(event.clientX - chart.view.container().getBoundingClientRect().left - chart.view.origin()[0]);
  const seen = new IntersectionObserver(found => found.forEach(f => { if (f.isIntersecting) { seen.unobserve(f.target); draw(f.target); } }), { rootMargin: "600px" });
  document.querySelectorAll(".chart").forEach(element => {
    const plot = element.querySelector(".plot");
    if (!figures[element.dataset.figure].data.lines) return;
    plot.tabIndex = 0;
    const ready = f => event => { const chart = drawn.get(element); if (chart?.view && chart.steps.length) f(chart, event); };
    plot.addEventListener("pointermove", ready((chart, event) => follow(element, under(chart, event))));
    plot.addEventListener("pointerleave", ready(() => follow(element, null)));
    plot.addEventListener("blur", ready(() => follow(element, null)));
    plot.addEventListener("keydown", ready((chart, event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
      if (!way) return;
      event.preventDefault();
      const now = chart.steps.indexOf(chart.view.signal("at")), to = now < 0 && Math.abs(way) === 1 ? chart.steps.length - 1 : now + way;
      follow(element, chart.steps[Math.max(0, Math.min(chart.steps.length - 1, to))]);
    }));
  });
  const say = text => document.querySelectorAll(".plot").forEach(plot => { plot.textContent = text; });
  const start = async () => { // the library is compressed in the page
    const packed = Uint8Array.from(atob(document.getElementById("library").textContent.trim()), c => c.charCodeAt(0));
    const code = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    const script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
    document.querySelectorAll(".chart").forEach(element => seen.observe(element));
  };
  if (window.DecompressionStream) start();
  else say("Charts need a browser of 2023 or later.");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((_, element) => draw(element)));
  addEventListener("beforeprint", () => document.querySelectorAll(".chart").forEach(e => { if (!drawn.has(e)) draw(e); }));
})();
