"""The weights of tokens in S²Q-VDiT's loss, of which a run keeps no picture."""

from recon.report.run import Missing, Run


def build(run: Run) -> Missing | None:
    """The section of one run; None where the method weighs no tokens."""
    if run.method != "S2QVDiT":
        return None
    return Missing(
        "The loss weighs each token by the attention it receives, from model.std.lambda_min to "
        "model.std.lambda_max. The weights are computed while a unit is open and are not kept "
        "with the run: there is no picture of them here."
    )
