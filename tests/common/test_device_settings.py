"""What a check of a device leaves for later runs."""

import json

import torch

from rob.common import device_settings
from rob.common.device_settings import DeviceSettings, settings_path, store_settings, stored_settings

CUDA = torch.device("cuda", 0)


def test_they_are_kept_by_device(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    stored_settings.cache_clear()
    assert stored_settings(CUDA) == DeviceSettings()
    found = DeviceSettings({"65536x256": "triton"}, "gpu", True)
    assert store_settings(CUDA, found) == settings_path() == tmp_path / "rob" / "devices.json"
    assert stored_settings(CUDA) == found
    assert stored_settings(torch.device("cpu")) == DeviceSettings()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    stored_settings.cache_clear()
    assert stored_settings(CUDA) == DeviceSettings()
    store_settings(CUDA, DeviceSettings(loader="auto"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    stored_settings.cache_clear()
    assert stored_settings(CUDA) == found


def test_a_damaged_file_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    path = settings_path()
    path.parent.mkdir()
    key = f"A card, torch {torch.__version__}"
    for text in ("{", "[]", json.dumps({key: {"nonsense": 1}}), json.dumps({key: 3})):
        path.write_text(text)
        device_settings.stored_settings.cache_clear()
        assert stored_settings(CUDA) == DeviceSettings()
    device_settings.stored_settings.cache_clear()


def test_older_files_say_whether_and_newer_how_a_student_is_compiled():
    kept = (None, False, True, "off", "default", "reduce-overhead")
    modes = [DeviceSettings(compile=value).compile_mode for value in kept]
    assert modes == ["off", "off", "default", "off", "default", "reduce-overhead"]
