"""The look of `report.html`."""

CSS = """
:root { color-scheme: light; --line: #d9dde3; --soft: #5a6472; --bar: #9cc3e6; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2330; background: #f6f7f9;
  margin: 0 auto; padding: 1rem; max-width: 1360px; }
h1 { font-size: 1.5rem; margin: .3rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
h3 { font-size: .95rem; margin: 1rem 0 .4rem; color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; margin-bottom: 1rem; }
p { margin: .3rem 0; }
.rule, .legend, dt { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; vertical-align: top; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 400; }
tr.task th { font-weight: 600; padding-top: .9rem; }
.bar { position: relative; height: 8px; width: 12rem; max-width: 100%; background: #eceff3;
  border-radius: 2px; }
.bar i { position: absolute; top: 0; bottom: 0; }
.value { background: var(--bar); }
.interval { background: #1f5f99; }
.bar .interval { top: 3px; bottom: 3px; min-width: 1px; }
.tick { background: #c0392b; }
.bar .tick { width: 2px; top: -2px; bottom: -2px; }
.key { display: inline-block; width: 14px; height: 8px; }
.key.interval { height: 3px; vertical-align: middle; }
.key.tick { width: 2px; height: 12px; vertical-align: middle; }
.box { display: inline-block; width: 14px; height: 11px; border: 3px solid; margin-left: .8rem; }
.box:first-child { margin-left: 0; }
.gallery { display: grid; gap: .8rem;
  grid-template-columns: repeat(6, 1fr); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: #eceff3; }
figcaption { padding: .4rem .5rem; font-size: .85rem; overflow-wrap: anywhere; }
dl { margin: 0; }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
figcaption dt, figcaption dd { display: inline; }
figcaption dt { margin-right: .4rem; }
figcaption dd::after { content: "\\A"; white-space: pre; }
.plots { display: grid; gap: .5rem 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.plot { max-width: 420px; }
.models { margin-bottom: .5rem; }
.models dt { font-weight: 600; }
svg { display: block; width: 100%; height: auto; font-size: 11px; }
svg text { fill: #1c2330; }
svg .name { text-anchor: end; }
svg .count { fill: var(--soft); }
svg .middle { text-anchor: middle; }
svg .track { fill: #eceff3; }
svg .fill { fill: var(--bar); }
svg .whisker { stroke: #1f5f99; stroke-width: 1.5; fill: none; }
svg .floor { stroke: #c0392b; stroke-width: 2; }
svg .grid { stroke: #e3e7ec; fill: none; }
svg .diagonal { stroke: #8b94a1; stroke-dasharray: 4 3; }
svg .curve { stroke: currentColor; fill: none; stroke-width: 2; }
svg .curve circle { fill: currentColor; stroke: none; }
.first { color: #1f5f99; }
.second { color: #b8480d; }
.line { display: inline-block; width: 16px; border-top: 3px solid; margin: 0 .3rem 0 .8rem;
  vertical-align: middle; }
details { margin: .3rem 0; }
summary, a { color: var(--soft); cursor: pointer; }
.no-image { aspect-ratio: 1; margin: 0; display: grid; place-items: center; color: var(--soft);
  background: #eceff3; }
@media (max-width: 900px) {
  body { padding: .5rem; }
  thead { display: none; }
  tr { display: block; border-top: 1px solid var(--line); padding: .35rem 0; }
  tr.task { border-top: 0; }
  th, td { display: block; padding: .05rem 0; white-space: normal; }
  tbody th { font-weight: 600; }
  td { display: inline-block; margin-right: .9rem; }
  td::before { content: attr(data-label) " "; color: var(--soft); }
  td[data-label=score] { display: block; }
  td[data-label=score]::before { content: ""; }
  td:empty { display: none; }
  .gallery { grid-template-columns: repeat(3, 1fr); }
}
@media (max-width: 600px) { .gallery { grid-template-columns: repeat(2, 1fr); } }
"""
