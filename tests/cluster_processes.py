"""The processes that Ray started on a local cluster of several nodes, and on no other Ray of this machine."""

from __future__ import annotations

from pathlib import Path

from cluster.local import LocalCluster, processes_of


def processes(title: str, cluster: LocalCluster) -> list[int]:
    """The cluster's own processes with such a title: those below its raylets."""
    raylets = {pid for node in cluster.nodes for pid in processes_of(node.folder)}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            named = (folder / "cmdline").read_bytes().decode().startswith(title)
        except OSError:
            continue  # it has just ended
        if named and parent in raylets:
            found.append(int(folder.name))
    return found
