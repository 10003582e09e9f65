# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip push --space`: the files of the Space, how it installs this package, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import small_model
from hub_server import OTHER_TOKEN, running_hub, use_hub

from modeling_mlip.hub import space
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.search import app, app_session


@pytest.fixture
def online(tmp_path, monkeypatch):
    with running_hub(tmp_path / "hub") as hub:
        use_hub(hub, monkeypatch, tmp_path / "cache")
        yield hub


def test_a_space_holds_the_page_of_its_model_and_installs_this_package(online, monkeypatch):
    requirement = "modeling-mlip[app] @ git+https://example.org/ada/mlip"
    assert space.push_space("ada/mine", requirement) == f"{online.url}/spaces/ada/mine"
    files = {name: path.read_text() for name, path in online.tree("spaces/ada/mine").items()}
    assert set(files) == {"README.md", "app.py", "requirements.txt"}
    assert online.info("spaces/ada/mine")["sdk"] == "gradio" and online.info("ada/mine") is None
    settings = yaml.safe_load(files["README.md"].split("---")[1])
    assert settings.pop("sdk_version", "6").startswith("6")  # of the Gradio that is installed here, if it is
    assert settings == {
        **{"title": "mine", "sdk": "gradio", "python_version": "3.11", "app_file": "app.py", "models": ["ada/mine"]}
    }
    assert files["requirements.txt"] == f"{requirement}\n"
    # app.py starts the page of this package with the model
    launched = []
    monkeypatch.setattr(app_session, "AppSession", lambda source: f"session of {source}")
    monkeypatch.setattr(app, "build_page", lambda session: SimpleNamespace(launch=lambda: launched.append(session)))
    exec(compile(files["app.py"], "app.py", "exec"), {})
    assert launched == ["session of ada/mine"]


def test_a_second_push_updates_the_space(online):
    for requirement in ("modeling-mlip[app]==0.1", "modeling-mlip[app]==0.2"):
        space.push_space("ada/mine", requirement)
    assert online.tree("spaces/ada/mine")["requirements.txt"].read_text() == "modeling-mlip[app]==0.2\n"


def test_a_refused_space_says_why(online, monkeypatch):
    space.push_space("ada/mine", "modeling-mlip[app]")
    with pytest.raises(ValueError, match="Space ada/mine exists and is public"):
        space.push_space("ada/mine", "modeling-mlip[app]", private=True)
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    with pytest.raises(OSError, match="Space ada/mine on http.*403.*hf auth login"):
        space.push_space("ada/mine", "modeling-mlip[app]")


VCS = {"url": "https://example.org/mlip", "vcs_info": {"vcs": "git", "commit_id": "12ab"}}
INSTALLED = {
    "repository": ({"direct_url.json": json.dumps(VCS), "INSTALLER": "pip"}, "@ git+https://example.org/mlip@12ab"),
    "index": ({"INSTALLER": "pip"}, "==0.1.0"),
    "folder": ({"direct_url.json": '{"url": "file:///home/ada/mlip", "dir_info": {}}', "INSTALLER": "pip"}, None),
    "clone that is not installed": ({}, None),
}


@pytest.mark.parametrize("source", INSTALLED)
def test_a_space_installs_the_package_from_where_it_was_installed_here(source, monkeypatch):
    files, expected = INSTALLED[source]
    package = SimpleNamespace(version="0.1.0", read_text=files.get)
    monkeypatch.setattr(space, "distribution", lambda name: package)
    if expected is None:
        with pytest.raises(ValueError, match="cannot read.*--space_requirement 'modeling-mlip.app. @ git"):
            space.default_requirement()
    else:
        assert space.default_requirement().replace(" ", "") == f"modeling-mlip[app]{expected}".replace(" ", "")


def test_a_model_that_the_page_cannot_show_is_refused_before_anything_is_pushed(online, tmp_path, capfd):
    small_model().vision_model.save_pretrained(tmp_path / "tower")
    command = ["push", str(tmp_path / "tower"), "ada/tower", "--space", "--space_requirement", "modeling-mlip[app]"]
    assert mlip(command) == 1
    assert "tower holds MLIPVisionModel without a processor; give an MLIPModel" in capfd.readouterr().err
    assert online.requests == []
