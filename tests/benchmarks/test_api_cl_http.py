"""Both sides of the benchmark get the same answers: it compares like with like."""

from __future__ import annotations

import pytest
import torch

from benchmarks.api_cl_http import Transport, bytes_against_json, classifier, in_flight_against_sequential
from zoo.api_cl.server import classifier_app, serving


def test_all_clients_get_what_the_network_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(classifier_app(classifier())) as url:
        transport = Transport(url, rows=20, max_batch=8)
        wanted = classifier().query(transport.images, "student")
        for protocol, max_inflight in (("oip", 1), ("oip_binary", 1), ("oip_binary", 4)):
            with transport.client(protocol, max_inflight) as api:
                torch.testing.assert_close(transport.run(api), wanted, rtol=1e-6, atol=1e-6)
        for measure, ratio in ((bytes_against_json, 5), (in_flight_against_sequential, 2)):
            record = measure(url, 16, 1)
            assert record["required_wall_ratio"] == ratio
            assert record["ours_rows_per_second"] == pytest.approx(16 / record["ours_wall_seconds"])
