import pytest

from stabilitykit.errors import UsageError
from trainers import flags
from trainers.cli import configure
from trainers.experiment import ExperimentConfig

GUIDE = (
    "--model causal-der --dataset seq-cifar100 --buffer_size 500 --alpha 0.3 --beta 0.3 --n_epochs 50 --batch_size 32 "
    "--lr 0.005 --optim_wd 0.0001 --clip_grad 1.0 --use_lr_decay 1 --adaptive_replay_weights 1 --mixed_precision 0 "
    "--seed 42 --dataset_config xder --nowand 1"
)


def config_of(command: str) -> ExperimentConfig:
    return configure(flags.parse(command.split()), ("test",))


def test_the_guides_command_is_taken_as_it_stands() -> None:
    config = config_of(GUIDE)

    assert (config.method, config.dataset.name, config.seed) == ("causal-der", "seq-cifar100", 42)
    assert (config.batch_size, config.buffer.size, config.buffer.minibatch_size) == (32, 500, 32)
    assert (config.replay.alpha, config.replay.beta, config.replay.adaptive) == (0.3, 0.3, "on")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.clip_norm) == (0.005, 0.0001, 1.0)
    assert (config.schedule.over_tasks, config.schedule.milestones, config.schedule.gamma) == ("on", (35, 45), 0.2)
    assert config.precision.format == "fp32"
    assert config.trainer.num_epochs == 50


def test_all_guards_and_no_guards_are_each_others_opposites() -> None:
    guarded, bare = config_of("--guards all"), config_of("--guards none")

    assert (guarded.schedule.over_tasks, bare.schedule.over_tasks) == ("hold", "off")
    assert (guarded.precision.whole_step, bare.precision.whole_step) == (True, False)
    assert (guarded.trainer.freeze_bn, bare.trainer.freeze_bn) == ("hold", "off")
    assert (guarded.buffer.sanitise, bare.buffer.sanitise) == (True, False)
    assert (guarded.causal.isolate, bare.causal.isolate) == (True, False)
    assert (guarded.watch.check, bare.watch.check) == (True, False)
    assert (guarded.clip_norm, bare.clip_norm) == (None, 0.0)
    assert (guarded.replay.adaptive, bare.replay.adaptive) == ("hold", "off")


def test_the_guides_eight_are_its_numbers_and_its_first_four_leave_the_others_off() -> None:
    guide, quick = config_of("--guards guide"), config_of("--guards quick --lr 0.1")

    assert (guide.schedule.over_tasks, guide.trainer.freeze_bn, guide.replay.adaptive) == ("on", "on", "on")
    assert (guide.clip_norm, guide.optimizer.lr, guide.optimizer.weight_decay) == (1.0, 0.005, 0.0001)
    assert (quick.schedule.over_tasks, quick.trainer.freeze_bn, quick.optimizer.lr) == ("on", "on", 0.1)
    assert (quick.clip_norm, quick.replay.adaptive, quick.watch.check) == (0.0, "off", False)


def test_a_list_of_guards_turns_the_others_off_and_explicit_flags_win() -> None:
    config = config_of("--guards clip,lr --lr 0.7 --freeze_bn 1")

    assert config.clip_norm is None
    assert config.optimizer.lr == 0.7
    assert config.schedule.over_tasks == "hold"
    assert config.trainer.freeze_bn == "on"
    assert not config.buffer.sanitise


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0", "fp32"),
        ("fp32", "fp32"),
        ("1", "bf16"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("fp16 --disable_amp", "fp32"),
    ],
)
def test_mixed_precision_takes_the_guides_numbers_and_names(given: str, expected: str) -> None:
    assert config_of(f"--mixed_precision {given}").precision.format == expected


@pytest.mark.parametrize("flag", flags.IGNORED)
def test_what_is_ignored_is_said_to_be(flag: str) -> None:
    assert config_of(f"{flag} x").seed == config_of(flag).seed == 0
    assert flag in flags.build_parser().format_help()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--lr fast", "--lr: got 'fast', expected a number"),
        ("--lr nan", "--lr: got nan, expected a finite number above 0"),
        ("--alpha -1", "--alpha: got -1.0, expected a finite number, 0 or more"),
        ("--n_epochs 1.5", "--n_epochs: got '1.5', expected a whole number"),
        ("--n_epochs 0", "--n_epochs: got 0, expected 1 or more"),
        ("--stop_after -1", "--stop_after: got -1, expected 0 (all tasks) or more"),
        ("--num_threads -1", "--num_threads: got -1, expected 0 (PyTorch's choice) or more"),
        ("--freeze_bn yes", "--freeze_bn: got 'yes', expected 0, 1 or hold"),
        ("--dataset seq-svhn", "--dataset: got 'seq-svhn', expected one of seq-fmnist-mini"),
        ("--model lwf", "--model: got 'lwf', expected one of sgd, joint, er, der, derpp, causal-der"),
        ("--guards clip,seatbelt", "--guards: got 'seatbelt', expected all, guide, quick, none, or a list of lr"),
        ("--mixed_precision fp8", "--mixed_precision: got 'fp8', expected 0, 1, fp32, bf16 or fp16"),
        ("--on_nonfinite pray", "--on_nonfinite: got 'pray', expected one of raise, skip, rollback, record"),
        ("--use_causal_sampling 7", "--use_causal_sampling: got 7, expected"),
        ("--clip_gradd 1", "got '--clip_gradd', expected a known flag; did you mean --clip_grad?"),
        ("--seed -1", "--seed: got -1, expected 0 to 4294967295"),
        ("--optim_nesterov 1", "--optim_nesterov: got 1 without momentum"),
        ("--lr", "--lr: expected one argument"),
    ],
)
def test_a_bad_value_is_one_line_that_says_what_was_expected(command: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(command)

    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
