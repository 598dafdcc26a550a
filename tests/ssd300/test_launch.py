"""run.sub with the configs and the names of folders that only SSD300 has. Nothing is trained."""

import pytest

from tests.test_run_sub import Machine


@pytest.mark.parametrize("config", ["SSD300_1CORE_BS128", "SSD300_8CORE_BS1024"])
def test_trials_of_a_config_for_tpus(tmp_path, config):
    machine = Machine(tmp_path)
    code, said = machine.run(config, NEXP="2", DATADIR=None, COCO_DIR=str(machine.data))
    assert code == 0, said
    preflight = next(call for call in machine.calls() if "preflight.py" in call)
    assert "--device cpu" in preflight and f"--data {machine.data}/set" in preflight
    train = [call for call in machine.calls() if "ssd300.train" in call and "--print" not in call]
    for k in (1, 2):
        folder = f"{machine.logs}/S_{k}"
        assert f"--save {folder}/checkpoints --json-summary {folder}/summary.json" in train[k - 1]
        found = machine.trial_environ(k - 1)
        assert found["SEED"] == str(41 + k) and found["DATASET_DIR"] == f"{machine.data}/set"
