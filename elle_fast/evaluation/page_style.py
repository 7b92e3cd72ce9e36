"""The look of all pages: one style sheet, for light and dark, from a phone's width on."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --text: #1c2126; --soft: #5d6872; --rule: #dfe3e6;
  --clean: #2f7ebc; --worst: #c2521b; --band: #c2521b2e; --good: #1b7a43; --bad: #b3261e; --warn: #fff4d6;
  --warn-edge: #d9a514; --run0: #0072b2; --run1: #c8500a; --run2: #00805a; --run3: #b8508f; --run4: #8c6d00;
  --run5: #5b3fa0; --run6: #5a5f64; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181c; --card: #1d2328; --text: #e6eaed; --soft: #9aa6b0; --rule: #343c44; --clean: #5fa8e0;
    --worst: #f08a4b; --band: #f08a4b33; --good: #5cc98a; --bad: #ff8a80; --warn: #3a3117; --warn-edge: #d9a514;
    --run0: #5fa8e0; --run1: #f08a4b; --run2: #3fc79a; --run3: #e69ac6; --run4: #d9bc50; --run5: #b39cf0;
    --run6: #b4bcc3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.soft, small { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin-top: 1.2rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .87rem; display: block; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-edge); border-radius: .3rem; padding: .6rem .9rem;
  margin: .8rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; font-size: .87rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.bars { width: 45%; min-width: 7rem; padding-right: 0; }
td.name { overflow-wrap: break-word; } td.attack { white-space: nowrap; }
td.attack small { white-space: normal; }
.bar { height: .5rem; border-radius: .25rem; background: var(--clean); margin: 2px 0; min-width: 2px; }
.bar.worst { background: var(--worst); }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; background: var(--clean); }
.key.worst { background: var(--worst); }
.gap td { border: 0; padding: .5rem 0 .2rem; color: var(--soft); font-size: .87rem; }
.chart { max-width: 34rem; background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
  padding: .6rem; }
.chart svg { display: block; width: 100%; height: auto; font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.line { fill: none; stroke: var(--worst); stroke-width: 2; } .spot { fill: var(--worst); } .band { fill: var(--band); }
line.marked { stroke: var(--soft); stroke-dasharray: 4 4; }
.good { color: var(--good); } .bad { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .8rem; }
.charts .chart { max-width: none; } .charts figcaption { margin: 0 0 .3rem; max-width: none; }
.charts svg { font-size: 14px; }
.run .line { stroke: var(--run); stroke-dasharray: var(--dash); } .run .spot, .alarm { fill: var(--run); }
.alarm { stroke: var(--card); } .collapse { stroke: var(--bad); stroke-width: 2.5; fill: none; }
.sample { width: 22px; height: 10px; margin-right: .4rem; stroke: var(--run); stroke-width: 3; }
.boxes { display: flex; flex-wrap: wrap; gap: 0 1rem; border: 1px solid var(--rule); border-radius: .6rem;
  padding: .2rem .8rem .4rem; margin: 0 0 .8rem; min-width: 0; }
.boxes legend { color: var(--soft); font-size: .87rem; padding: 0 .3rem; }
.boxes label { padding: .3rem 0; overflow-wrap: anywhere; } .boxes input { margin: 0 .4rem 0 0; }
.runs td, .runs th { vertical-align: top; padding-right: 1.1rem; } .runs td { white-space: nowrap; }
.runs tr > :first-child { position: sticky; left: 0; background: var(--back); }
.runs th[scope=row] { color: var(--text); font-size: .93em; overflow-wrap: anywhere; min-width: 11rem;
  max-width: 14rem; }
.runs button { all: unset; cursor: pointer; white-space: nowrap; } .runs button small { display: block; }
.runs button:focus-visible, .scroll:focus-visible { outline: 2px solid var(--clean); outline-offset: 2px; }
[aria-sort=ascending] button::after { content: " ▲"; } [aria-sort=descending] button::after { content: " ▼"; }
.runs .verdict { min-width: 13rem; white-space: normal; }
td.off, th.off, svg .off { display: none; } tr.off { opacity: .5; }
summary { cursor: pointer; margin: 1rem 0 .6rem; }
.example { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .8rem 1rem;
  margin: .8rem 0; }
.example h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; }
figure .pair { display: flex; gap: .4rem; }
figure img { width: 7rem; height: 7rem; object-fit: contain; border-radius: .3rem; display: block; }
img.pixels { image-rendering: pixelated; }
figcaption { font-size: .85rem; line-height: 1.35; margin-top: .3rem; max-width: 14.4rem; overflow-wrap: anywhere; }
.single figcaption { max-width: 7rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
bdi, h1, td, dd, .warning { unicode-bidi: isolate; }
code, .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .88em; }
@media (max-width: 30rem) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  th, td { padding-right: .6rem; } td.bars { width: 30%; min-width: 4rem; }
  .runs th[scope=row] { min-width: 7rem; } .runs .verdict { min-width: 9rem; }
  .accuracies .bars, .accuracies th:last-child { display: none; }
}
@media print { body { background: none; } .card, .example, .chart { break-inside: avoid; } }
"""
