"""The style sheet of reports, light or dark as the reader's system asks."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --faint: #6b6b70; --line: #d9d9de;
  --hit: 0 114 178; --miss: 224 138 0;
  --c0: #0072b2; --c1: #e08a00; --c2: #1c1c1e; --c3: #b0407c; --c4: #7a5bc4; --c5: #00875f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #ececee; --faint: #a3a3aa; --line: #3a3b40;
    --hit: 40 125 185; --miss: 170 95 0;
    --c0: #4db3ee; --c1: #e08a00; --c2: #fff; --c3: #f08cc0; --c4: #b7a0f5; --c5: #3fd0a0; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.note { color: var(--faint); font-size: .87rem; margin: .4rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
th:first-child { text-align: left; } thead th { color: var(--faint); font-weight: 600;
  vertical-align: bottom; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.beside > * { min-width: 0; max-width: 100%; } .even > * { flex: 1 1 320px; }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 1rem; padding: 0;
  list-style: none; font-size: .75rem; line-height: 1.3; }
.tiles li { width: 80px; overflow-wrap: anywhere; } .tiles span, .tiles img { display: block; }
.tiles img { margin-bottom: .15rem; } .tiles .query { font-weight: 600; }
.tiles .same img { outline: 2px solid var(--c0); } .tiles .other img { outline: 2px solid
  var(--c1); }
.pixels { image-rendering: pixelated; }
td.bar { min-width: 8rem; background: linear-gradient(to right, rgb(var(--hit) / .45)
  calc(100% * var(--share)), transparent 0); }
.confusion td, .confusion th { padding: .2rem .35rem; border: 0; }
.confusion td { min-width: 1.6rem; text-align: center; border: 1px solid var(--line); }
.confusion .hit { background: rgb(var(--hit) / calc(.75 * var(--share, 0))); }
.confusion .miss { background: rgb(var(--miss) / var(--share, 0)); }
.confusion .turned { writing-mode: vertical-rl; text-align: end; }
.map .frame { fill: none; stroke: var(--line); } .map path { fill: none; stroke-width: 5;
  stroke-linecap: round; opacity: .75; }
.even .legend svg { width: 10px; margin-right: .3rem; } .even circle { stroke: none; }
.map text { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; }
.pictures td { text-align: left; vertical-align: top; }
.pictures img { max-width: none; image-rendering: pixelated; }
.words { margin: 0; padding: 0; list-style: none; white-space: nowrap; }
pre { overflow-x: auto; font-size: .8rem; padding: .8rem; border: 1px solid var(--line); }
figure { margin: 1.2rem 0 1.8rem; } figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0; padding: 0;
  list-style: none; font-size: .87rem; }
.legend svg { width: 28px; height: 10px; margin-right: .4rem; }
figure > svg { width: 100%; height: auto; font-size: 12px; }
svg .paper { fill: var(--paper); } svg > svg, svg > g { font: 12px system-ui, sans-serif; }
svg text { fill: var(--faint); text-anchor: middle; }
svg text.y { text-anchor: end; dominant-baseline: middle; } svg text.level { text-anchor: end; }
svg text.name { text-anchor: start; }
svg .axis { fill: none; stroke: var(--faint); } svg .grid { stroke: var(--line); }
svg .level { stroke-dasharray: 2 4; } svg path.level { stroke: var(--ink); }
svg polyline, svg .stroke { fill: none; stroke: currentColor; stroke-linejoin: round; }
svg circle { fill: currentColor; stroke: none; }
svg .dashed { stroke-dasharray: 6 4; }
svg .series0 { color: var(--c0); stroke-width: 8; } svg .series1 { color: var(--c1);
  stroke-width: 4.5; } svg .series2 { color: var(--c2); stroke-width: 1.5; }
svg .series3 { color: var(--c3); stroke-width: 1.5; } svg .series4 { color: var(--c4);
  stroke-width: 1.5; } svg .series5 { color: var(--c5); stroke-width: 1.5; }
"""
