"""`helexa status`, on a report as the gateway gives it."""

import io
from copy import deepcopy

import pytest
from rich.console import Console

from helexa.cli.status import render

GIB = 2**30
REPORT = {
    "url": "http://127.0.0.1:31313",
    "status": "ok",
    "summary": {"healthy": 1, "total": 2},
    "nodes": [
        {
            "name": "beast",
            "state": "up",
            "endpoint": "http://beast:13131",
            "error": None,
            "devices": [
                {"index": 0, "name": "RTX 5090", "total_bytes": 32 * GIB, "free_bytes": 8 * GIB},
                {"index": 1, "name": "RTX 5090", "total_bytes": 32 * GIB, "free_bytes": 32 * GIB},
            ],
            "models": [
                {
                    "id": "tiny",
                    "status": "loaded",
                    "active": 1,
                    "limit": {"context": 8192},
                    "memory_bytes": 3 * GIB // 2,
                    "load": {"in_flight": 1, "max_in_flight": 4, "queue_depth": 2, "tok_s_decode": 41.23},
                },
                {
                    "id": "slow",
                    "status": "loading",
                    "active": 0,
                    "load": None,
                    "progress": {"phase": "weights", "percent": 41.7, "remaining_s": 12.3},
                },
            ],
        },
        {
            "name": "benjy",
            "state": "down",
            "endpoint": "http://benjy:13131",
            "error": "Cannot connect",
            "devices": [],
            "models": [],
        },
    ],
    "loading": {"slow": "beast", "fresh": "beast"},
    "waiting": {
        "other": {"node": "beast", "seconds": 31.4, "requests": 2, "displaces": ["tiny"]},
        "third": {"node": "beast", "seconds": 1.0, "requests": 1, "displaces": []},
    },
    "aliases": {},
}


def shown(report):
    console = Console(file=io.StringIO(), width=140)
    render(report, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "line",
    [
        "http://127.0.0.1:31313 ok 1 of 2 nodes up",
        "beast up http://beast:13131 0: RTX 5090 24.0 GiB of 32.0 GiB used",
        "1: RTX 5090 0.0 GiB of 32.0 GiB used",
        "benjy down http://benjy:13131 Cannot connect",
        "tiny beast loaded 8192 1.5 GiB 1 of 4 2 41.2",
        "slow beast loading 42 % weights, 12 s left 0 0",
        "fresh beast loading",
        "other beast waiting 31 s for its turn, then tiny must leave 2",
        "third beast waiting 1 s for its turn 1",
    ],
)
def test_the_tables_show(line):
    lines = [" ".join(row.split()) for row in shown(REPORT).splitlines()]
    assert line in lines


def test_what_cannot_serve_is_told_with_its_reason():
    report = deepcopy(REPORT) | {
        "status": "impaired",
        "unservable": [{"node": "beast", "model": "bad", "reason": "poisoned", "detail": "illegal address"}],
    }
    assert "bad on beast is poisoned: illegal address" in shown(report)


def test_a_fleet_without_models_has_no_empty_table():
    report = deepcopy(REPORT)
    report["nodes"][0]["models"] = []
    report |= {"loading": {}, "waiting": {}}
    assert "TOK/S" not in shown(report)
