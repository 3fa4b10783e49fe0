"""The page for people: one file, no network, every text escaped; readable without JavaScript, sortable with it."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from eval.similar.findings import Findings
from eval.similar.groups import Group, gather, suggestion
from llmops import files
from llmops.console import UserError, log

TITLE = "相似问题与意图分析"  # also how a page of ours is told from other files
SHOWN = 20_000  # pairs that a browser still scrolls through; the page says so when there are more
OPEN = 3  # groups that are open at first

STYLE = """
:root{color-scheme:light dark;--line:#d8dce3;--soft:#f4f6f9;--text:#1d2530;--quiet:#667083;--mark:#2a6fbb;
--warn:#b8413c}
@media(prefers-color-scheme:dark){:root{--line:#3a414d;--soft:#232932;--text:#e6e9ee;--quiet:#9aa4b5;--mark:#7db3f0;
--warn:#f08a85}body{background:#191d23}}
body{font:15px/1.6 "PingFang SC","Microsoft YaHei","Noto Sans CJK SC","WenQuanYi Micro Hei",sans-serif;
color:var(--text);max-width:1200px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:0 0 4px}.quiet{color:var(--quiet);font-size:13px}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}
.card{background:var(--soft);border-radius:8px;padding:10px 18px}.card b{display:block;font-size:24px;line-height:1.3}
.tools{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}.tools input,.tools select{font:inherit;padding:4px 8px}
.tools input{flex:1 1 240px}details{border:1px solid var(--line);border-radius:8px;margin:10px 0;overflow:hidden}
summary{cursor:pointer;padding:10px 14px;background:var(--soft)}summary h2{display:inline;font-size:16px;margin:0}
.tag{display:inline-block;border-radius:4px;padding:0 8px;font-size:12px;margin-left:6px;border:1px solid currentColor}
.merge{color:var(--mark)}.relabel{color:var(--warn)}.advice{margin:10px 14px}
table{border-collapse:collapse;width:100%;table-layout:fixed}th,td{text-align:left;vertical-align:top;padding:6px 14px;
border-top:1px solid var(--line);overflow-wrap:anywhere}th{font-size:13px;color:var(--quiet)}
th button{all:unset;cursor:pointer}
th button:focus-visible{outline:2px solid var(--mark)}th.n,td.n{width:84px}td small{display:block;color:var(--quiet)}
th[aria-sort=descending] button::after{content:" ↓"}th[aria-sort=ascending] button::after{content:" ↑"}
[hidden]{display:none}
"""

SCRIPT = """
const list=document.getElementById('groups'),find=document.getElementById('find'),kind=document.getElementById('kind'),
order=document.getElementById('order'),none=document.getElementById('none');
const groups=[...list.children].map(e=>({e,text:e.textContent.toLowerCase()}));
function show(){const wanted=find.value.trim().toLowerCase();let left=0;
for(const g of groups){
g.e.hidden=!(g.text.includes(wanted)&&(!kind.value||g.e.dataset.kind===kind.value));left+=!g.e.hidden}
none.hidden=left>0}
function sort(){const key=order.value;
groups.sort((a,b)=>key==='name'?a.e.dataset.name.localeCompare(b.e.dataset.name,'zh')
:b.e.dataset[key]-a.e.dataset[key]);list.append(...groups.map(g=>g.e))}
find.oninput=show;kind.onchange=show;order.onchange=sort;
list.addEventListener('click',event=>{const button=event.target.closest('th button');if(!button)return;
const head=button.parentNode,table=head.closest('table'),body=table.tBodies[0],k=head.cellIndex,
down=head.getAttribute('aria-sort')!=='descending';
for(const other of table.querySelectorAll('th'))other.removeAttribute('aria-sort');
head.setAttribute('aria-sort',down?'descending':'ascending');
const value=row=>row.cells[k].dataset.v??row.cells[k].textContent;
body.append(...[...body.rows].sort((a,b)=>(head.classList.contains('n')?value(a)-value(b)
:value(a).localeCompare(value(b),'zh'))*(down?-1:1)))});
document.getElementById('tools').hidden=false;
"""


def write_report(
    found: Findings, path: Path, data: str, model: str, threshold: float, intent_threshold: float
) -> None:  # fmt: skip
    """Write the page; it appears under its name when it is complete."""
    groups = gather(found)
    shares = share_out(groups)
    with files.writing(path) as file:
        file.writelines(head(found, groups, data, model, threshold, intent_threshold))
        if sum(shares) < len(found.a):
            file.write(f'<p class="relabel">共 {len(found.a)} 对，本页显示每组最相似的若干对，合计 {sum(shares)} 对；'
                       "完整结果在命令打印的 JSON 中。</p>\n")  # fmt: skip
            log(f"the page shows {sum(shares)} of {len(found.a)} pairs, the most similar of each group")
        file.write('<div id="groups">\n')
        for number, (group, share) in enumerate(zip(groups, shares, strict=True)):
            if share:
                file.writelines(section(found, group, share, number < OPEN))
        file.write('</div>\n<p id="none" hidden>没有符合条件的意图组。</p>\n')
        file.write(f"<script>{SCRIPT}</script>\n</body>\n</html>\n")


def refuse_other(path: Path) -> None:
    """Raise UserError for a target that is there and is no page of ours."""
    if not path.exists():
        return
    with files.open_regular(path, "the page's target") as stream:
        start = stream.read(1000).decode("utf-8", "replace")
    if start and f"<title>{TITLE}</title>" not in start:
        raise UserError(f"{path} is there and is no page of this command, which would replace it; choose another name")


def share_out(groups: list[Group]) -> list[int]:
    """How many pairs of each group are shown: all, or the same limit for every group so that SHOWN is kept."""
    sizes = [len(group.rows) for group in groups]
    limit = max(sizes, default=0)
    while limit > 1 and sum(min(size, limit) for size in sizes) > SHOWN:
        limit = limit * 3 // 4
    left = SHOWN
    shares = []
    for size in sizes:
        shares.append(min(size, limit, left))
        left -= shares[-1]
    return shares


def head(
    found: Findings, groups: list[Group], data: str, model: str, threshold: float, intent_threshold: float
) -> Iterator[str]:
    """Everything above the groups."""
    merge = int(found.merge.sum())
    cards = (
        (len(found.questions.order), "问题"), (len(found.questions.intents), "意图"), (len(groups), "组易混意图"),
        (len(found.a) - merge, "对疑似标错"), (merge, "对建议合并意图"),
    )  # fmt: skip
    yield (
        '<!DOCTYPE html>\n<html lang="zh-CN">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n"
    )
    yield (
        f'<p class="quiet">数据 {escape(data)} · 模型 {escape(model)} · 问题相似度 ≥ {threshold:g} · 意图相似度 ≥ '
        f"{intent_threshold:g} 视为同义</p>\n"
    )
    yield '<div class="cards">'
    yield "".join(f'<div class="card"><b>{count}</b>{name}</div>' for count, name in cards)
    yield "</div>\n"
    yield (
        "<p>下面每一组是两个意图，以及它们之间意思相近的问题。<b>疑似标错</b>：问题相似而意图不同，其中一个很可能标错了。"
        "<b>建议合并</b>：意图名称也相似，很可能是同一个意图。行号从 0 开始，是记录在文件中的序号。</p>\n"
    )
    yield (
        '<div class="tools" id="tools" hidden><input id="find" type="search" placeholder="查找问题、意图或答案" '
        'aria-label="查找"><select id="kind" aria-label="类别"><option value="">全部</option><option value="relabel">'
        '疑似标错</option><option value="merge">建议合并</option></select><select id="order" aria-label="排序">'
        '<option value="pairs">按对数排序</option><option value="best">按问题相似度排序</option>'
        '<option value="intent">按意图相似度排序</option><option value="name">按意图名称排序</option></select></div>\n'
    )
    if not groups:
        yield "<p><b>没有发现意图不同的相似问题。</b>可以降低相似度阈值再试。</p>\n"


def section(found: Findings, group: Group, share: int, is_open: bool) -> Iterator[str]:
    """One group with its questions side by side; the first column is always the group's first intent."""
    first, second = (escape(found.questions.intents[intent]) for intent in group.intents)
    kind, tag = ("merge", "建议合并") if group.merge else ("relabel", "疑似标错")
    best = float(found.cosine[group.rows[0]])
    yield (
        f'<details data-kind="{kind}" data-pairs="{len(group.rows)}" data-best="{best:.4f}" '
        f'data-intent="{group.intent_cosine:.4f}" data-name="{first}"{" open" if is_open else ""}>\n'
        f'<summary><h2>{first} ↔ {second}</h2><span class="tag {kind}">{tag}</span> <span class="quiet">'
        f"{len(group.rows)} 对 · 最相似 {best:.4f} · 意图相似度 {group.intent_cosine:.4f}</span></summary>\n"
        f'<p class="advice">{escape(suggestion(found, group))}</p>\n<table>\n<thead><tr>'
        f"<th><button>{first}</button></th><th><button>{second}</button></th>"
        '<th class="n" aria-sort="descending"><button>相似度</button></th></tr></thead>\n<tbody>\n'
    )
    for k in group.rows[:share]:
        sides = [int(found.a[k]), int(found.b[k])]
        if found.intent_a[k] != group.intents[0]:
            sides.reverse()
        yield f'<tr>{"".join(cell(found, side) for side in sides)}<td class="n">{found.cosine[k]:.4f}</td></tr>\n'
    yield "</tbody>\n</table>\n</details>\n"


def cell(found: Findings, question: int) -> str:
    """A question with its record and its answer."""
    record = found.questions.records[found.questions.record[question]]
    text = escape(found.questions.texts[found.text_of[question]])
    answer = f" · 答案：{escape(record.reply)}" if record.reply else ""
    return f'<td data-v="{text}">{text}<small>行 {record.index}{answer}</small></td>'
