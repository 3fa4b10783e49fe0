"""The console's routes: one list for the application of serve/app.py."""

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from llmops import files
from llmops.console import UserError
from serve.console import shown
from serve.console.curation import Curation
from serve.console.diagnosis import Diagnoses
from serve.console.mount import Mounted
from serve.console.pages import Pages, whole_number
from serve.console.runs import STATES, Runs

PER_PAGE = 50
MOST_COMPARED = 8


def routes(mount: Path) -> list[BaseRoute]:
    """Every page over the files of a mount."""
    pages, mounted = Pages(), Mounted(mount)
    parts = (RunPages(pages, mounted), CuratorPages(pages, mounted))
    return [*(route for part in parts for route in part.routes()), *pages.shared()]


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
            pages.data("/console/api/diagnosis", lambda request: self.diagnoses.of(named(request))),
            pages.write("/console/api/stop", self.stop),
        ]

    def _rows(self, request: Request) -> dict[str, Any]:
        """The runs of one page of the list, by the query's search, state and page."""
        search = request.query_params.get("q", "").strip()
        state = request.query_params.get("state", "")
        names = [name for name in self.runs.newest() if search.lower() in name.lower()]
        page = max(1, whole_number(request, "page", 1))
        if state in STATES:  # every run has to be looked at
            found = [run for run in self.runs.several(names) if run.state == state]
            total, found = len(found), found[(page - 1) * PER_PAGE : page * PER_PAGE]
        else:
            total = len(names)
            found = self.runs.several(names[(page - 1) * PER_PAGE : page * PER_PAGE])
        last = max(1, -(-total // PER_PAGE))
        return {"found": found, "total": total, "page": page, "last": last, "search": search, "state": state}

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
        about = self.runs.about(name)
        return self.pages.render(request, "run.html", run=run, cells=shown.cells(run, t), about=about)

    def one_json(self, request: Request) -> Any:
        """A run's live values."""
        return shown.run_json(self.runs.one(named(request)), self.pages.translator(request))

    def compare(self, request: Request) -> Response:
        """Several runs on one chart."""
        t = self.pages.translator(request)
        names = list(dict.fromkeys(request.query_params.getlist("run")))[:MOST_COMPARED]
        found = [self.runs.one(name) for name in names]
        about = [self.runs.about(run.name)["settings"] for run in found]
        keys = sorted({key for settings in about for key in settings})
        differ = [key for key in keys if len({files.dumps(settings.get(key)) for settings in about}) > 1]
        rows = [(run, shown.cells(run, t)) for run in found]
        return self.pages.render(request, "compare.html", rows=rows, settings=about, differ=differ)

    def log(self, request: Request) -> Any:
        """Columns of a log from a byte on."""
        return self.runs.log(named(request), whole_number(request, "offset"), whole_number(request, "identity"))

    def stop(self, body: dict[str, Any]) -> Any:
        """Ask a run to stop."""
        name = body.get("run")
        if not isinstance(name, str):
            raise UserError('found no "run"; expected the name of a run')
        self.runs.ask_to_stop(name)
        return {"run": name, "state": self.runs.one(name).state}


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
