"""The parts of Ray that vime uses although they are no public API exist in this release."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.stack

ROOT = Path(__file__).parents[2]
PUBLIC = ("ray", "ray.cloudpickle", "ray.util.placement_group", "ray.util.scheduling_strategies")
USED = {
    "ray._private.authentication.authentication_token_setup": {"ensure_token_if_auth_enabled"},
    "ray._private.services": {"find_bootstrap_address"},
    "ray._private.state": {"available_resources_per_node"},
    "ray._raylet": {"GcsClient"},
    "ray.core.generated.gcs_pb2": {"GcsNodeInfo"},
}


def test_this_file_names_all_of_them():
    found: dict[str, set[str]] = {}
    for file in (ROOT / "vime").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray."):
                found.setdefault(str(node.module), set()).update(n.name for n in node.names)
    assert {module: names for module, names in found.items() if module not in PUBLIC} == USED


@pytest.mark.parametrize(("module", "name"), [(m, n) for m in USED for n in sorted(USED[m])])
def test_every_private_symbol_exists(module, name):
    assert hasattr(import_module(module), name)


def test_they_take_what_vime_gives_them():
    from ray._private.authentication import authentication_token_setup as setup
    from ray._private.services import find_bootstrap_address
    from ray._private.state import available_resources_per_node
    from ray._raylet import InnerGcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    inspect.signature(setup.ensure_token_if_auth_enabled).bind(create_token_if_missing=False)
    inspect.signature(find_bootstrap_address).bind(None)
    inspect.signature(available_resources_per_node).bind()
    assert callable(InnerGcsClient.get_all_node_info)  # GcsClient passes the call on
    assert GcsNodeInfo.GcsNodeState.ALIVE == 0
    assert {"state", "node_manager_address"} <= set(GcsNodeInfo.DESCRIPTOR.fields_by_name)


def test_ray_has_the_names_that_vime_writes_as_texts():
    from ray import _raylet
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    from vime.ray import cluster, placement_group

    assert placement_group._NODE_LABEL == _raylet.RAY_NODE_ID_KEY
    assert f'"{RAY_JOB_CONFIG_JSON_ENV_VAR}"' in inspect.getsource(cluster)
