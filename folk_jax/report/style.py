"""The page's style: one column that widens, in light and dark, for screens and for paper."""

CSS = """
:root{color-scheme:light dark;--bg:#f7f7f4;--card:#fff;--ink:#1d2226;--soft:#5c666e;--line:#e2e2dc;--accent:#0b6e6a;
--good:#18794e;--bad:#c2410c;--c0:#0b6e6a;--c1:#d9730d;--c2:#6a5acd;--c3:#c0397b;--c4:#5a8f29;--c5:#3b82c4;--c6:#8a6d3b}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1d2125;--ink:#e8eaec;--soft:#a2abb3;--line:#31373d;
--accent:#4fc3bd;--good:#54c78c;--bad:#f59e6b;--c0:#4fc3bd;--c1:#f2a65a;--c2:#a79bff;--c3:#f28cb8;--c4:#a3cf6e;
--c5:#7db8f0;--c6:#d2b48c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","Liberation Sans",sans-serif;-webkit-text-size-adjust:100%}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:40px;padding-bottom:4px}
h1{font-size:clamp(1.6rem,1.2rem + 1.8vw,2.3rem);line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;
overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:0 0 4px;letter-spacing:-.01em}
h3{font-size:1rem;margin:0}
p{margin:0 0 12px;max-width:72ch}
.lead{color:var(--soft);margin-bottom:16px;overflow-wrap:anywhere}
.notice{border-left:4px solid var(--bad);background:var(--card);padding:10px 14px;border-radius:0 8px 8px 0;
max-width:none;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:12px;overflow:hidden;margin:0 0 8px}
.facts div{flex:1 1 150px;background:var(--card);padding:10px 14px;min-width:0}
.facts dt{font-size:.78rem;color:var(--soft)}
.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;padding:10px 0 0;font-size:.92rem}
a{color:var(--accent)}
nav a{text-decoration:none}
section{padding:34px 0 0}
section>.intro{color:var(--soft)}
figure{margin:0}
figcaption{color:var(--soft);font-size:.86rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:16px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:16px}
.pairs .card,.charts .card,.pairs .strip{margin:0}
.pairs{align-items:start}.charts+.table{margin-top:16px}
.chart,.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.chart{display:flex;flex-direction:column}
.chart svg{width:100%;height:auto;margin:8px 0 6px;overflow:visible}
.card{margin:0 0 16px}
.card>figcaption{margin-top:10px;max-width:90ch}
.card h3{margin-bottom:8px;overflow-wrap:anywhere}
.card>.strip+h3,.card>.strip+.strip{margin-top:16px}
.groups{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:18px 22px}
.groups .strip{margin:0}
svg text{fill:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
svg .y{text-anchor:end}
svg .grid{stroke:var(--line);stroke-width:1}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
rect.strip{fill:var(--ink);fill-opacity:0}
rect.strip:hover{fill-opacity:.08}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.82rem;color:var(--soft);margin-top:2px}
.entry{white-space:nowrap}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;margin:0 6px 3px 0}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}
.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}.line.c6{stroke:var(--c6)}
.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}.dot.c3{fill:var(--c3)}
.dot.c4{fill:var(--c4)}.dot.c5{fill:var(--c5)}.dot.c6{fill:var(--c6)}
.key.c0{background:var(--c0)}.key.c1{background:var(--c1)}.key.c2{background:var(--c2)}.key.c3{background:var(--c3)}
.key.c4{background:var(--c4)}.key.c5{background:var(--c5)}.key.c6{background:var(--c6)}
.strip{display:grid;gap:12px 10px;grid-template-columns:repeat(var(--columns),minmax(0,1fr))}
.cell{min-width:0}
.cell img{display:block;width:100%;height:auto;border-radius:5px;background:var(--line);margin-bottom:4px}
.cell img.pixels{image-rendering:pixelated}
.cell b{display:block;font-size:.84rem;line-height:1.3;color:var(--ink);overflow:hidden;text-overflow:ellipsis}
.cell figcaption{font-size:.78rem;line-height:1.35;overflow-wrap:break-word}
.cell.right img:first-child{outline:3px solid var(--good);outline-offset:-1px}
.cell.wrong img:first-child{outline:3px solid var(--bad);outline-offset:-1px}
.cell.right b{color:var(--good)}.cell.wrong b{color:var(--bad)}
.scroll{overflow-x:auto}
.table{overflow:hidden;border:1px solid var(--line);border-radius:12px;background:var(--card);margin:0 0 16px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:7px 14px;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
th{font-size:.8rem;color:var(--soft);font-weight:600}
td.n,th.n{text-align:right;white-space:nowrap}
td{overflow-wrap:break-word}
details td{overflow-wrap:anywhere}
.table>figcaption{padding:10px 14px;border-top:1px solid var(--line)}
details{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:0 0 16px;overflow:hidden}
summary{cursor:pointer;padding:12px 16px;font-weight:600}
details .table{border:0;border-top:1px solid var(--line);border-radius:0;margin:0}
details td{font-size:.84rem;padding:4px 14px}
footer{color:var(--soft);font-size:.86rem;padding-top:30px;padding-bottom:50px}
@media (max-width:640px){main,header,footer{padding-left:14px;padding-right:14px}header{padding-top:22px}
.chart,.card{padding:12px}section{padding-top:28px}.strip{gap:10px 8px;
grid-template-columns:repeat(var(--narrow,3),minmax(0,1fr))}.cell figcaption,.cell b{font-size:.75rem}
.strip.dense{gap:8px 5px}.strip.dense figcaption,.strip.dense b{font-size:.66rem;hyphens:auto}
th,td{padding:6px 8px}.facts div{flex-basis:45%}}
@media print{body{background:#fff}.card,.chart{break-inside:avoid}}
"""
