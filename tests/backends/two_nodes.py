"""A Ray cluster of two nodes of one CPU each, as a process: 'remove' and 'add' on its stdin do so to the second node."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

from dist_train.node import free_port

# A node takes all of the machine's memory unless it is told.
SIZE = {"num_cpus": 1, "memory": 500 * 2**20, "object_store_memory": 100 * 2**20}


def main() -> None:
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port()}
    # Two clusters of a machine would want the same: the second's agent then takes no jobs.
    dashboard["dashboard_agent_listen_port"] = free_port()
    cluster = Cluster(initialize_head=True, head_node_args=SIZE | dashboard)
    node = cluster.add_node(**SIZE)
    print(cluster.address, cluster.webui_url, flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(node, allow_graceful=False)
        else:
            node = cluster.add_node(**SIZE)
        print(line.strip(), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
