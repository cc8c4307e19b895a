"""rob push: what is sent, and that a dry run sends nothing."""

import pytest
import timm
import torch

from rob.common.errors import FailureError, MisuseError
from rob.common.records import sealed
from rob.student_train.check import check
from rob.student_train.checkpoint import export_weights, load_student
from rob.student_train.evaluate.results import write_result
from rob.student_train.export.config import ExportConfig, PushConfig
from rob.student_train.export.export import export
from rob.student_train.export.push import push
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.tiny import contents


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)


def a_run(folder, student=StudentConfig("test_vit", 32)):  # noqa: B008 (frozen)
    export_weights(build_student(student).eval(), describe_student(student), folder / "student.safetensors")
    settings = {
        "data": "/home/me/photos.beton", "data_fingerprint": "abc", "epochs": 3, "seed": 0, "loader": {"batch_size": 8},
        "branch": {"kind": "cached", "teacher": "big_one"}, "objective": {"name": "dino"}, "recipe": {"name": "weak"},
        "versions": {"torch": "2"},
    }  # fmt: skip
    (folder / "config.json").write_bytes(sealed(settings))
    write_result(folder, "knn", {"top1": 61.25, "train": "/home/me/train.beton", "test": "/home/me/test.beton"})
    write_result(folder, "knn-random", {"top1": 20.5, "train": "train.beton", "test": "a fifth of train.beton"})
    write_result(folder, "linear-augment-random", {"top1": 30.5, "train": "train.beton", "test": "/home/me/test.beton"})
    shots = [{"labels": "5 a class", "mean": 12.5, "share": {"fraction": None, "per_class": 5}}]
    write_result(folder, "lowshot-msn", {"results": shots, "train": "train.beton", "test": "test.beton"})
    write_result(folder, "segment", {"miou": 33.5, "train": "/home/me/cells/train", "test": "/home/me/cells/test.json"})
    return folder


def test_a_dry_run_makes_a_folder_that_timm_loads_with_a_card(tmp_path):
    run = a_run(tmp_path / "run")
    export(ExportConfig(run, ("torch",)))
    folder, sent = push(PushConfig(run, "me/tiny", dry_run=True), {"big_one": "CC-BY-NC-4.0"}.get)
    assert sent is None
    assert sorted(contents(folder)) == ["README.md", "config.json", "export.json", "model.safetensors", "student.pt2"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        torch.testing.assert_close(found, load_student(run)[0](images))
    card = (folder / "README.md").read_text()
    for expected in (
        "library_name: timm", "hf-hub:me/tiny", "big_one", "CC-BY-NC-4.0", "61.25 %", "student.pt2",
        "rob eval knn RUN train.beton --test test.beton", "photos.beton",
        "| segment mIoU | 33.50 % | `rob eval segment RUN train test.json` |",
        "| knn-random | 20.50 % | `rob eval knn RUN train.beton --init random` |",
        "| 30.50 % | `rob eval linear RUN train.beton --test test.beton --augment --init random` |",
        "| 12.50 % | `rob eval lowshot RUN train.beton --test test.beton --protocol msn --per-class 5` |",
    ):  # fmt: skip
        assert expected in card
    assert "/home/me" not in card
    assert check(run).damaged == ()


def test_an_unknown_teachers_licence_is_called_unknown(tmp_path):
    folder, _ = push(PushConfig(a_run(tmp_path / "run"), "me/tiny", dry_run=True), lambda name: None)
    assert "| licence of the teacher's weights | not known to rob" in (folder / "README.md").read_text()


def test_a_small_cnn_is_sent_as_rob_reads_it(tmp_path):
    run = a_run(tmp_path / "run", StudentConfig("test_resnet", 32))
    folder, _ = push(PushConfig(run, "me/tiny", dry_run=True), lambda name: None)
    assert sorted(contents(folder)) == ["README.md", "student.safetensors"]
    assert 'backbone, info = rob.load_student("student.safetensors")' in (folder / "README.md").read_text()
    load_student(folder / "student.safetensors")


def test_exports_and_results_of_other_weights_stay_here(tmp_path):
    run = a_run(tmp_path / "run")
    export(ExportConfig(run, ("torch",)))
    a_run(run)  # trained anew
    write_result(run, "knn", {"top1": 61.25, "train": "a.beton", "test": "b.beton", "weights": "from before"})
    folder, _ = push(PushConfig(run, "me/tiny", dry_run=True), lambda name: None)
    assert "student.pt2" not in contents(folder)
    assert "61.25" not in (folder / "README.md").read_text()
    assert "20.50" in (folder / "README.md").read_text()


def test_a_card_of_ones_own_is_sent(tmp_path):
    run = a_run(tmp_path / "run")
    (tmp_path / "README.md").write_text("# Mine\n")
    folder, _ = push(PushConfig(run, "me/tiny", dry_run=True, card=tmp_path / "README.md"), lambda name: None)
    assert (folder / "README.md").read_text() == "# Mine\n"
    with pytest.raises(MisuseError, match="`licence` is for rob's card"):
        PushConfig(run, "me/tiny", card=tmp_path / "README.md", licence="mit")
    with pytest.raises(MisuseError, match=r"`card` .*gone\.md cannot be read .*No such file"):
        push(PushConfig(run, "me/tiny", dry_run=True, card=tmp_path / "gone.md"), lambda name: None)


def test_without_a_network_it_is_one_sentence(tmp_path):
    with pytest.raises(FailureError, match=r"me/tiny was not sent \(no network\): log in"):
        push(PushConfig(a_run(tmp_path / "run"), "me/tiny"), lambda name: None)


def test_what_is_sent_is_the_folder(tmp_path, monkeypatch):
    import huggingface_hub

    sent = {}
    url = type("Url", (str,), {"repo_id": "me/tiny"})("https://hub/me/tiny")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: sent.update(options) or url)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: sent.update(options))
    run = a_run(tmp_path / "run")
    folder, where = push(PushConfig(run, "tiny", private=True), lambda name: None)
    assert (where, sent["private"], sent["repo_id"], sent["folder_path"]) == (url, True, "me/tiny", folder)


@pytest.mark.parametrize("name", ["me/", "a b", "me/x/y", "-x/y"])
def test_a_name_that_the_hub_has_not(tmp_path, name):
    with pytest.raises(MisuseError, match="give USER/MODEL"):
        PushConfig(tmp_path, name)
