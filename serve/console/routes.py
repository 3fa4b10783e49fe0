"""The console's routes: one list for the application of serve/app.py."""

from pathlib import Path
from threading import Thread
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from llmops import files
from llmops.console import UserError
from serve.console import faq, shown
from serve.console.curation import Curation
from serve.console.diagnosis import Diagnoses
from serve.console.evaluations import DIMENSIONS, FILTERS, Evaluations, labels_of
from serve.console.languages import language_of
from serve.console.mount import Mounted
from serve.console.pages import Pages, query, whole_number
from serve.console.radar import radar
from serve.console.runs import STATES, Runs

PER_PAGE = 50
SAMPLES_PER_PAGE = 10
QUESTIONS_PER_PAGE = 25
MOST_COMPARED = 8
DIAGNOSES = 4  # requests for one that are in a thread; one is made at a time


def routes(mount: Path) -> list[BaseRoute]:
    """Every page over the files of a mount."""
    pages, mounted = Pages(), Mounted(mount)
    Thread(target=mounted.look, daemon=True).start()  # the first reader does not wait for the first walk
    parts = [kind(pages, mounted) for kind in (RunPages, EvaluationPages, FaqPages, CuratorPages)]
    chat = pages.page("/chat", lambda request: pages.render(request, "chat.html"))
    return [*(route for part in parts for route in part.routes()), chat, *pages.shared()]


class RunPages:
    """The list of runs, a run, several runs on one chart."""

    def __init__(self, pages: Pages, mounted: Mounted) -> None:
        self.pages, self.mounted = pages, mounted
        self.runs, self.diagnoses = Runs(mounted), Diagnoses(mounted)

    def routes(self) -> list[BaseRoute]:
        """Pages and what their scripts fetch."""
        pages = self.pages
        return [
            pages.page("/", self.listed),
            pages.page("/runs/{name:path}", self.one),
            pages.page("/compare", self.compare),
            pages.data("/console/api/runs", self.listed_json),
            pages.data("/console/api/run", self.one_json),
            pages.data("/console/api/log", self.log),
            pages.data("/console/api/diagnosis", self.diagnosis, DIAGNOSES),
            pages.write("/console/api/stop", self.stop),
        ]

    def _rows(self, request: Request) -> dict[str, Any]:
        """The runs of one page of the list, by the query's search, state and page."""
        search = request.query_params.get("q", "").strip()
        state = request.query_params.get("state", "")
        names = [name for name in self.runs.newest() if search.lower() in name.lower()]
        page = max(1, whole_number(request, "page", 1))  # how many there are is not known yet
        if state in STATES:  # every run has to be looked at
            found = [run for run in self.runs.several(names) if run.state == state]
            total, found = len(found), found[(page - 1) * PER_PAGE : page * PER_PAGE]
        else:
            total = len(names)
            found = self.runs.several(names[(page - 1) * PER_PAGE : page * PER_PAGE])
        last = max(1, -(-total // PER_PAGE))
        return {"found": found, "total": total, "page": page, "last": last, "search": search, "state": state}

    def diagnosis(self, request: Request) -> dict[str, Any]:
        """The diagnosis of a run, its sentences in the reader's language."""
        return self.diagnoses.of(named(request), language_of(request))

    def listed(self, request: Request) -> Response:
        """The list."""
        t, rows = self.pages.translator(request), self._rows(request)
        shown_rows = [(run, shown.cells(run, t)) for run in rows["found"]]
        return self.pages.render(request, "runs.html", rows=shown_rows, states=STATES, listed=rows,
                                 truncated=self.mounted.look().truncated)  # fmt: skip

    def listed_json(self, request: Request) -> Any:
        """The list's live values."""
        t = self.pages.translator(request)
        return {"runs": [shown.run_json(run, t) for run in self._rows(request)["found"]]}

    def one(self, request: Request) -> Response:
        """A run's page."""
        t, name = self.pages.translator(request), request.path_params["name"]
        run = self.runs.one(name)
        return self.pages.render(request, "run.html", run=run, cells=shown.cells(run, t), about=self.runs.about(name),
                                 checkpoints=shown.checkpoints(self.runs.checkpoints(name), t))  # fmt: skip

    def one_json(self, request: Request) -> Any:
        """A run's live values."""
        t, name = self.pages.translator(request), named(request)
        found = shown.run_json(self.runs.one(name), t)
        return found | {"checkpoints": shown.checkpoints(self.runs.checkpoints(name), t)}

    def compare(self, request: Request) -> Response:
        """Several runs on one chart."""
        t = self.pages.translator(request)
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        found = [self.runs.one(name) for name in names[:MOST_COMPARED]]
        about = [self.runs.about(run.name)["settings"] for run in found]
        keys = sorted({key for settings in about for key in settings})
        differ = [key for key in keys if len({shown.amount(settings.get(key)) for settings in about}) > 1]
        rows = [(run, shown.cells(run, t)) for run in found]
        return self.pages.render(request, "compare.html", rows=rows, settings=about, differ=differ,
                                 left_out=len(names) - len(found))  # fmt: skip

    def log(self, request: Request) -> Any:
        """Columns of a log from a byte on."""
        return self.runs.log(named(request), whole_number(request, "offset"), request.query_params.get("identity", ""))

    def stop(self, body: dict[str, Any]) -> Any:
        """Ask a run to stop."""
        name = body.get("run")
        if not isinstance(name, str):
            raise UserError('found no "run"; expected the name of a run')
        self.runs.ask_to_stop(name)
        return {"run": name, "state": self.runs.one(name).state}


class EvaluationPages:
    """Results side by side, the samples behind a score."""

    def __init__(self, pages: Pages, mounted: Mounted) -> None:
        self.pages, self.evaluations = pages, Evaluations(mounted)

    def routes(self) -> list[BaseRoute]:
        """Pages alone: nothing here changes while it is looked at."""
        return [self.pages.page("/evaluations", self.listed), self.pages.page("/evaluations/samples", self.samples)]

    def listed(self, request: Request) -> Response:
        """Every result; those that were marked on one radar, with their table."""
        found = list(self.evaluations.all())
        names = list(dict.fromkeys(request.query_params.getlist("result")))[:MOST_COMPARED]
        marked = [(name, self.evaluations.one(name)) for name in names]
        if not marked:  # the first of the five dimensions stand for themselves
            marked = [(name, result) for name, result in found if result and result.five][:2]
        five = [(name, result) for name, result in marked if result.five]
        told = dict.fromkeys(d for _, result in five for d in result.scores)
        dimensions = [d for d in DIMENSIONS if d in told] + [d for d in told if d not in DIMENSIONS]
        others = [(name, result) for name, result in marked if not result.five]
        links = {
            (name, of): query(a=name, b=next(iter(self.evaluations.beside(name, of, marked)), ""), set=of)
            for name, result in marked for of in result.sets if self.evaluations.has(name, of)
        }  # fmt: skip
        return self.pages.render(
            request, "evaluations.html", found=found, marked=[name for name, _ in marked], five=five, others=others,
            labels=labels_of(five), other_labels=labels_of(others), dimensions=dimensions,
            metrics=list(dict.fromkeys(metric for _, result in others for metric in result.scores)),
            drawn=radar([result for _, result in five], dimensions), links=links,
        )  # fmt: skip

    def samples(self, request: Request) -> Response:
        """The samples of one set, of one or two results."""
        asked = request.query_params
        first, second, of = asked.get("a", ""), asked.get("b", ""), asked.get("set", "")
        chosen, search = asked.get("show", "all"), asked.get("q", "").strip()
        result = self.evaluations.one(first)
        found = self.evaluations.asked(first, second, of)
        filters = FILTERS if second else FILTERS[:4]
        chosen = chosen if chosen in filters else "all"
        kept = [row for row in found.rows if row.passes(chosen) and (not search or row.has(search.lower()))]
        page, last = page_of(request, len(kept), SAMPLES_PER_PAGE)
        alike = self.evaluations.beside(first, of, self.evaluations.all())
        both = [(first, result)] + ([(second, self.evaluations.one(second))] if second else [])
        return self.pages.render(
            request, "samples.html", first=first, second=second, of=of, chosen=chosen, search=search, found=found,
            kept=len(kept), rows=kept[(page - 1) * SAMPLES_PER_PAGE : page * SAMPLES_PER_PAGE], page=page, last=last,
            alike=alike, labels=labels_of(both), filters=filters,
        )  # fmt: skip


class FaqPages:
    """Predictions of intents."""

    def __init__(self, pages: Pages, mounted: Mounted) -> None:
        self.pages, self.mounted = pages, mounted
        self.faq = faq.Faq(mounted)

    def routes(self) -> list[BaseRoute]:
        """One page."""
        return [self.pages.page("/faq", self.page)]

    def page(self, request: Request) -> Response:
        """Files of predictions; of one its intents, confusions, and the questions that were asked for."""
        asked, listed = request.query_params, self.mounted.look().predictions
        name = asked.get("file", "") or (listed[0] if listed else "")
        if not name:
            return self.pages.render(request, "faq.html", listed=[], name="")
        rows, candidates = self.faq.open(name)
        below = share_of(request, "below")
        wanted: dict[str, Any] = {
            "true": asked.get("true", ""), "predicted": asked.get("predicted", ""), "below": below,
            "wrong": asked.get("wrong") == "1", "search": asked.get("q", "").strip(),
        }  # fmt: skip
        kept = faq.chosen(rows, **wanted)
        page, last = page_of(request, len(kept), QUESTIONS_PER_PAGE)
        known = [row for row in rows if row.true]
        return self.pages.render(
            request, "faq.html", listed=listed, name=name, total=len(rows), known=len(known),
            right=sum(row.true == row.intent for row in known), intents=faq.intents_of(rows, candidates),
            matrix=faq.matrix_of(rows), wanted=wanted, kept=len(kept), page=page, last=last,
            rows=kept[(page - 1) * QUESTIONS_PER_PAGE : page * QUESTIONS_PER_PAGE],
        )  # fmt: skip


class CuratorPages:
    """Reports to work on, the work on one."""

    def __init__(self, pages: Pages, mounted: Mounted) -> None:
        self.pages, self.mounted = pages, mounted
        self.curation = Curation(mounted)

    def routes(self) -> list[BaseRoute]:
        """Pages and what their scripts fetch and send."""
        pages = self.pages
        return [
            pages.page("/curator", self.page),
            pages.data("/console/api/curator", self.state),
            pages.write("/console/api/curator/decide", self.curation.decide),
            pages.write("/console/api/curator/write", self.curation.write),
        ]

    def page(self, request: Request) -> Response:
        """The reports, or the work on one of them."""
        found, report = self.mounted.look(), request.query_params.get("report", "")
        if not report:
            return self.pages.render(request, "reports.html", reports=found.pairs)
        data = request.query_params.get("data", "") or self.curation.data_for(report)
        if data:
            self.curation.open(report, data)
        return self.pages.render(request, "curator.html", report=report, data=data, choices=found.data)

    def state(self, request: Request) -> Any:
        """Groups, pairs, decisions."""
        return self.curation.state(request.query_params.get("report", ""), request.query_params.get("data", ""))


def named(request: Request) -> str:
    """The run that a query names."""
    return request.query_params.get("run", "")


def page_of(request: Request, count: int, size: int) -> tuple[int, int]:
    """(the page that is asked for, the last one)."""
    last = max(1, -(-count // size))
    return min(last, max(1, whole_number(request, "page", 1))), last


def share_of(request: Request, name: str) -> float | None:
    """A number from 0 to 1 of the query, None where it is left out. Raises UserError for another text."""
    given = request.query_params.get(name, "").strip()
    try:
        value = float(given) if given else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"{name} is {files.shown(given)}, expected a number from 0 to 1, such as 0.6")
    return value
