import importlib.metadata

import pytest

import skipcache
from skipcache import plugins
from skipcache.cli import main


def test_version(capsys):
    """``--version`` prints the version of the installed distribution."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"skipcache {skipcache.__version__}"
    assert importlib.metadata.version("skipcache") == skipcache.__version__


def test_adapters_lists_origin_and_claims(capsys):
    """Every adapter is listed with the distribution and version it came from and what it claims."""
    assert main(["adapters"]) == 0
    printed = capsys.readouterr().out
    assert f"dit_xl  (skipcache {skipcache.__version__})" in printed
    assert "DiTTransformer2DModel" in printed


def test_adapters_lists_what_failed_to_load(monkeypatch, capsys):
    """A plugin that cannot be imported is listed with the reason, and the exit status is 1."""
    broken = importlib.metadata.EntryPoint("broken", "skipcache_no_such_module", "skipcache")
    found = [*importlib.metadata.entry_points(group="skipcache"), broken]
    monkeypatch.setattr(plugins, "_default", None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    assert main(["adapters"]) == 1
    printed = capsys.readouterr().out
    assert "broken" in printed
    assert (
        "FAILED TO LOAD: ModuleNotFoundError: No module named 'skipcache_no_such_module'" in printed
    )
    assert "dit_xl" in printed


def test_no_command_is_an_error(capsys):
    """Without a command the usage is shown."""
    with pytest.raises(SystemExit):
        main([])
    assert "COMMAND" in capsys.readouterr().err
