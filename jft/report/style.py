"""The style sheet of report.html: one accent colour, light and dark, from a phone to a desk."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f5f2; --card: #ffffff; --ink: #1c1d21; --soft: #565962; --faint: #6c6f78;
  --line: #e5e3dd; --band: #f3f1ec; --accent: #2f54c4; --accent-rgb: 47 84 196;
  --on-accent: #ffffff; --track: #eceae4; --line-strong: #cfccc4;
  --second: #b06f22; --grey: #8b8e97;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1b1d21; --ink: #e9e9ec; --soft: #b0b3bb; --faint: #8f939d;
    --line: #2d3036; --band: #22252a; --accent: #8aa8ff; --accent-rgb: 112 146 245;
    --on-accent: #0d1330; --track: #2a2d33; --line-strong: #454951;
    --second: #dfa75c; --grey: #7d818b;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
main { max-width: 1080px; margin: 0 auto; padding: clamp(20px, 5vw, 56px) clamp(14px, 4vw, 40px); }
header { margin-bottom: 28px; }
.eyebrow {
  color: var(--faint); font-size: 12px; letter-spacing: .08em; text-transform: uppercase;
}
h1 { margin: 2px 0 4px; font-size: clamp(24px, 4.4vw, 34px); line-height: 1.2;
  letter-spacing: -.015em; font-weight: 650; }
.lead { margin: 0; color: var(--soft); font-size: 16px; max-width: 72ch; text-wrap: pretty; }
.pill {
  display: inline-block; margin-left: 8px; padding: 1px 9px; border: 1px solid var(--line);
  border-radius: 99px; color: var(--soft); letter-spacing: 0; text-transform: none;
}
.pill.alert { border-color: var(--ink); color: var(--ink); font-weight: 600; }
.tiles { display: grid; gap: 12px; margin: 22px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px 12px; }
.tile dt { color: var(--soft); font-size: 13px; }
.tile dd { margin: 0; font-size: 25px; font-weight: 620; line-height: 1.3;
  letter-spacing: -.01em; }
.tile .note { display: block; color: var(--faint); font-size: 12.5px; font-weight: 400;
  letter-spacing: 0; line-height: 1.4; }
.tile.first dd { color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: clamp(16px, 3vw, 26px); margin-top: 16px; }
h2 { margin: 0 0 2px; font-size: 18px; font-weight: 630; letter-spacing: -.005em; }
h3 { margin: 22px 0 6px; font-size: 14px; font-weight: 620; }
.about { margin: 0 0 16px; color: var(--soft); font-size: 14px; max-width: 72ch;
  text-wrap: pretty; }
.about:last-child { margin-bottom: 0; }
code, .mono { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }

.charts { display: grid; gap: 26px 34px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; min-width: 0; }
.chart:last-child:nth-child(odd):not(:first-child) { grid-column: 1 / -1; }
.chart:last-child:nth-child(odd):not(:first-child) .area { height: 120px; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline;
  margin-bottom: 8px; font-size: 13px; color: var(--soft); }
.chart figcaption b { color: var(--ink); font-size: 14px; font-weight: 620; margin-right: auto; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; background: var(--s); }
.plot { position: relative; padding: 0 6px 22px 46px; }
.bands { position: relative; height: 20px; }
.bands span { position: absolute; bottom: 4px; font-size: 12px; line-height: 15px;
  color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  padding: 0 2px 0 6px; border-left: 1px solid var(--faint); }
.area { position: relative; height: 190px; }
.area svg { display: block; width: 100%; height: 100%; overflow: visible; }
.area path, .area line { vector-effect: non-scaling-stroke; fill: none; }
.tick { position: absolute; color: var(--faint); font-size: 12px; line-height: 14px;
  white-space: nowrap; }
.tick.y { right: 100%; margin-right: 8px; transform: translateY(-50%); }
.tick.x { top: 100%; margin-top: 6px; transform: translateX(-50%); }
.tick.x.first { transform: none; } .tick.x.last { transform: translateX(-100%); }
.charts.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); }
.charts + .charts { margin-top: 26px; }
.small { align-items: end; }
.small .area { height: 104px; }
.small .chart:last-child:nth-child(odd):not(:first-child) { grid-column: auto; }
.small .chart:last-child:nth-child(odd):not(:first-child) .area { height: 104px; }
.squares { align-items: end;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); }
.square { max-width: 380px; }
.square .plot { padding: 0 10px 42px 62px; }
.square .area, .squares .square:last-child:nth-child(odd):not(:first-child) .area {
  height: auto; aspect-ratio: 1; }
.squares .square:last-child:nth-child(odd):not(:first-child) { grid-column: auto; }
.square figcaption b { flex-basis: 100%; }
.square .key { max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.side, .under { position: absolute; color: var(--soft); font-size: 12.5px; line-height: 16px; }
.side { left: 0; top: 0; bottom: 42px; writing-mode: vertical-rl; transform: rotate(180deg);
  text-align: center; }
.under { left: 62px; right: 10px; bottom: 0; text-align: center; }
.squares + .scroll { margin-top: 22px; }

.bars { display: grid; gap: 12px; margin: 0; }
.bars .row { display: grid; gap: 2px 16px; align-items: center;
  grid-template-columns: minmax(120px, 260px) 1fr 64px; }
.bars dt { font-size: 14px; line-height: 1.35; }
.bars dt small { display: block; color: var(--faint); font-size: 12.5px; font-weight: 400; }
.bars dd { margin: 0; }
.bars .value { text-align: right; font-weight: 560; }
.bar { display: block; height: 12px; border-radius: 3px; background: var(--track);
  overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--faint); }
.this .bar i, .bar.accent i { background: var(--accent); }
.this dt, .this .value { font-weight: 650; }
.this .value { color: var(--accent); }

.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: 0 -4px; padding: 0 4px; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; overflow-wrap: normal; }
th, td { padding: 7px 12px 7px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-size: 12.5px; font-weight: 500; white-space: nowrap;
  vertical-align: bottom; }
tbody th { font-weight: 500; } tbody tr:last-child > * { border-bottom: 0; }
tfoot td, tfoot th { color: var(--soft); border-bottom: 0; font-weight: 500; }
tfoot tr:first-child > * { border-top: 1px solid var(--line); }
td.n, th.n { text-align: right; white-space: nowrap; padding-left: 12px; }
th.n:last-child, td.n:last-child { padding-right: 2px; }
td.name, th.name { max-width: 260px; min-width: 110px; overflow-wrap: anywhere; }
.mini { display: inline-block; width: 84px; height: 7px; margin-right: 10px; border-radius: 2px;
  background: var(--track); overflow: hidden; vertical-align: middle; }
.mini + .wide { display: inline-block; min-width: 56px; }
.mini i { display: block; height: 100%; background: var(--accent); }
.on, .off { display: inline-block; padding: 0 9px; border-radius: 99px; font-size: 12.5px;
  white-space: nowrap; }
.strip { display: block; width: 100%; min-width: 180px; height: 12px; border-radius: 3px;
  background: var(--track); }
.on { background: var(--accent); color: var(--on-accent); }
.off { color: var(--faint); border: 1px solid var(--line); }
.kv th { width: 26%; min-width: 150px; color: var(--soft); font-weight: 500; padding-right: 24px;
  overflow-wrap: anywhere; }
.kv td { overflow-wrap: anywhere; min-width: 150px; }

.scores td.n { font-weight: 560; }
.scores td.what { color: var(--soft); padding-left: 28px; min-width: 230px; }

table.matrix { width: auto; font-size: 13px; border-spacing: 2px; border-collapse: separate; }
.matrix th, .matrix td { border: 0; padding: 0; }
.matrix td { min-width: 38px; height: 34px; text-align: center; vertical-align: middle;
  border-radius: 4px; background: rgb(var(--accent-rgb) / var(--a, 0)); color: var(--ink);
  padding: 0 4px; }
.matrix td.zero { background: var(--band); color: transparent; }
.matrix td.deep { color: var(--on-accent); }
.matrix tbody th { position: sticky; left: 0; background: var(--card); padding: 0 10px 0 0;
  text-align: right; font-weight: 500; vertical-align: middle; max-width: 150px;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; z-index: 1; }
.matrix thead th { text-align: center; padding: 0 2px 4px; max-width: 44px; }
.matrix thead th.long span { writing-mode: vertical-rl; transform: rotate(180deg);
  max-height: 130px; overflow: hidden; text-overflow: ellipsis; display: inline-block; }
.few.matrix td { min-width: 60px; height: 52px; font-size: 15px; }
.dense.matrix { border-spacing: 1px; font-size: 11px; line-height: 1; }
.dense.matrix td { min-width: 13px; width: 13px; height: 13px; padding: 0; border-radius: 2px; }
.dense.matrix tbody td:not([style]) { background: var(--band); }
.dense.matrix tbody th { max-width: 110px; padding-right: 6px; }
.dense.matrix thead th { padding: 0; }
.heat { width: 540px; max-width: 100%; aspect-ratio: 1; border: 1px solid var(--line);
  border-radius: 6px; image-rendering: pixelated; background: var(--card); display: block; }
.two { display: grid; gap: 24px 40px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .two { grid-template-columns: minmax(0, auto) minmax(220px, 1fr); } }
@media (min-width: 900px) { .two.wide { grid-template-columns: minmax(0, 1fr); } }
.told { margin: 20px 0 0; max-width: 72ch; text-wrap: pretty; }
.plain { list-style: none; margin: 0; padding: 0; font-size: 14px; }
.plain li { display: flex; gap: 12px; padding: 5px 0; border-bottom: 1px solid var(--line); }
.plain li:last-child { border-bottom: 0; } .plain b { margin-left: auto; font-weight: 560; }

.gallery { display: grid; gap: 18px 14px; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.gallery.roomy { grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); }
.gallery.roomy .frame { max-width: 128px; }
.gallery .frame { aspect-ratio: 1; border-radius: 8px; background: var(--band);
  display: grid; place-items: center; overflow: hidden; border: 1px solid var(--line); }
.gallery img { width: 100%; height: 100%; object-fit: contain; }
.gallery img.small { image-rendering: pixelated; }
.gallery figcaption { margin-top: 6px; font-size: 13px; line-height: 1.4; }
.gallery figcaption div { display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 3; overflow: hidden; }
.gallery figcaption span { color: var(--faint); display: block; font-size: 12px; }
.stack { display: flex; height: 12px; gap: 2px; border-radius: 3px; overflow: hidden;
  margin-bottom: 10px; background: var(--track); }
.stack i { display: block; background: rgb(var(--accent-rgb) / var(--a)); min-width: 3px; }
.legend { list-style: none; margin: 0 0 24px; padding: 0; display: flex; flex-wrap: wrap;
  gap: 4px 22px; font-size: 13.5px; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 560; margin-left: 4px; }
.legend .key::before { width: 10px; height: 10px; }
section > h3:first-of-type { margin-top: 8px; }
details + details { margin-top: 14px; }
summary { cursor: pointer; font-size: 14px; font-weight: 560; padding: 2px 0; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
details > .scroll { margin-top: 8px; }
footer { color: var(--faint); font-size: 13px; margin: 22px 2px 0; }
@media (max-width: 560px) {
  .bars .row { grid-template-columns: 1fr 64px; }
  .bars dt { grid-column: 1 / -1; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile dd { font-size: 22px; }
  .scores .what { display: none; }
  .matrix:not(.dense):not(.few) td { min-width: 27px; height: 29px; padding: 0 2px;
    font-size: 12px; }
  .mini { display: none; } .mini + .wide { min-width: 0; }
  td.n, th.n { padding-left: 6px; padding-right: 6px; }
  .matrix tbody th { max-width: 96px; }
  .gallery { grid-template-columns: repeat(3, 1fr); }
  .gallery.roomy { grid-template-columns: repeat(2, 1fr); }
}
@media print { body { background: none; } section { break-inside: avoid; } }
"""
