"""The report's style sheet and its script, by themselves."""

POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'; "
    "base-uri 'none'"
)
"""Nothing may be fetched or sent."""

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d1d1f; --faint: #61616a; --line: #d9d9de; --card: #f3f3f1;
  --link: #1f66a8; --same: #14734f; --note: #7a4b00; }
@media (prefers-color-scheme: dark) { :root { --paper: #151618; --ink: #ececee; --faint: #a3a3ad; --line: #3a3b40;
  --card: #1f2023; --link: #7db7ee; --same: #5fd0a0; --note: #f0b860; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: .4rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
p { margin: .5rem 0; max-width: 52rem; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--card); padding: .1em .35em; border-radius: 4px;
  overflow-wrap: anywhere; }
.caption, figcaption, small, .lead { color: var(--faint); }
.missing { border-left: 3px solid var(--note); padding: .3rem .8rem; background: var(--card); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .92rem; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--faint); font-weight: 600; }
tbody th { font-weight: 500; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td { max-width: 26rem; overflow-wrap: break-word; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--link); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: .5rem 0; min-width: 0; }
figcaption { font-size: .88rem; max-width: 52rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; margin: .3rem 0 .8rem; }
.tile { display: inline-flex; flex-direction: column; width: 6rem; }
.tile small { font-size: .74rem; line-height: 1.3; overflow-wrap: anywhere; }
.frame { position: relative; display: block; line-height: 0; }
.frame img { width: 100%; height: auto; border-radius: 2px; }
img.small { image-rendering: pixelated; }
.same small { color: var(--same); font-weight: 600; }
.query { margin-right: .8rem; }
.box { position: absolute; border: 2px solid; line-height: 1; font-size: .62rem; }
.box b { position: absolute; left: 0; top: 0; background: #000a; color: #fff; padding: 1px 3px; font-weight: 600; }
.row { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: flex-start; padding: .4rem 0;
  border-bottom: 1px dotted var(--line); }
.row > div { min-width: 0; }
.who { font-size: .82rem; color: var(--faint); margin: 0; }
/* plotly writes its own colours into the drawing; these follow the theme */
.plot text { fill: var(--ink) !important; }
.plot .hoverlayer text { fill: #fff !important; }
.plot .gridlayer path { stroke: var(--line) !important; }
.plot .zerolinelayer path, .plot path.xlines-above, .plot path.ylines-above { stroke: var(--faint) !important; }
.plot .modebar-group, .plot .modebar { background: transparent !important; }
.asked { display: grid; grid-template-columns: 8rem 1fr; border-bottom: 1px dotted var(--line); padding: .5rem 0; }
.whole { width: 9rem; }
@media (max-width: 40rem) { .asked { grid-template-columns: 1fr; } body { padding: .6rem; } .tile { width: 4rem; } }
@media print { nav, .modebar { display: none; } }
"""

SCRIPT = """
(async () => {
  const plots = document.querySelectorAll('.plot');
  try {
    const packed = Uint8Array.from(atob(document.getElementById('plotly').textContent), c => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
    const script = document.createElement('script');
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    for (const plot of plots) {
      const figure = JSON.parse(plot.firstElementChild.textContent);
      plot.replaceChildren();
      await Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displaylogo: false,
        modeBarButtons: [['toImage', 'zoom2d', 'pan2d', 'resetScale2d']]});
    }
    document.documentElement.dataset.drawn = plots.length;
  } catch (problem) {
    for (const plot of plots) plot.textContent = 'The plots need a browser of 2023 or later (' + problem + ').';
    throw problem;
  }
})();
"""
