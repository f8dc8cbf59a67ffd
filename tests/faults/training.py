"""Faults in the trainer and in distill()."""

from __future__ import annotations

from .kinds import Backend, Fault

OBJECTIVES, OPTIMIZERS = "srpkd/training/objectives.py", "srpkd/training/optimizers.py"

BACKENDS = {
    "training": Backend(
        "tests/training/test_objectives.py tests/training/test_optimizers.py "
        "-k lr_factor or cycle_gan_losses or states or clipped or average",
        [
            Fault(
                "float16: clips scaled gradients",
                OPTIMIZERS,
                "            self.scaler.unscale_(optimizer)\n",
                "",
                "tests/training/test_optimizers.py -k clipped",
            ),
            Fault("the learning rate falls an epoch early", OBJECTIVES, "epoch - n_epochs)", "epoch - n_epochs + 1)"),
            Fault(
                "the weights of the identity losses are swapped",
                OBJECTIVES,
                "weight_A, weight_B = config",
                "weight_B, weight_A = config",
            ),
            Fault(
                "the average takes most of the new weights",
                OBJECTIVES,
                "1.0 - self.config.ema)",
                "self.config.ema)",
                "tests/training/test_optimizers.py -k average",
            ),
            Fault(
                "buffers are not averaged",
                OBJECTIVES,
                "chain(network.parameters(), network.buffers())",
                "network.parameters()",
                "tests/training/test_optimizers.py -k average",
            ),
            Fault(
                "distill: gradients add up over steps",
                "srpkd/distill_loop.py",
                "                    optimizer.zero_grad()\n",
                "",
                "tests/test_distill_loop.py",
            ),
            Fault(
                "averages are not restored",
                OBJECTIVES,
                'average.load_state_dict(state["averages"][name])',
                "pass",
            ),
        ],
    ),
}
