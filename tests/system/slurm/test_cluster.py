"""The test cluster does what the tests rely on: jobs on several nodes, a lost node, bytes counted."""

from __future__ import annotations

import sys

from helpers.slurm_cluster import Cluster, wait_for

SEND = """
import os, socket, time
print(socket.gethostname(), flush=True)
if os.environ["SLURM_PROCID"] == "0":
    connection = socket.create_server(("", 7000)).accept()[0]
    print(sum(map(len, iter(lambda: connection.recv(65536), b""))))
else:
    for _ in range(200):
        try:
            connection = socket.create_connection(("node1", 7000))
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    connection.sendall(bytes(3_000_000))
"""


def test_nodes_are_apart_and_their_traffic_is_counted(cluster: Cluster) -> None:
    before = cluster.bytes_sent()
    out = cluster.client("srun", "-N2", "-n2", "-w", "node1,node2", sys.executable, "-c", SEND)
    assert set(out.split()) == {"node1", "node2", "3000000"}
    sent = {node: count - before[node] for node, count in cluster.bytes_sent().items()}
    assert 3_000_000 < sent["node2"] < 3_500_000
    assert sent["node1"] < 500_000
    assert sent["node3"] < 100_000


def test_a_node_without_power_is_missed_and_comes_back(cluster: Cluster) -> None:
    def missed() -> bool:
        return "node3" in cluster.client("sinfo", "-h", "-N", "-t", "down", "-o", "%N")

    cluster.verb("power-off", "node3")
    wait_for(missed, 180, "Slurm to miss node3")
    cluster.verb("power-on", "node3")
    wait_for(lambda: not missed(), 180, "node3 to come back")
    assert cluster.client("srun", "-w", "node3", "hostname") == "node3"
