"""How the processors are shared. Import before torch."""

import os


def share() -> None:
    """Have threads of a matrix product that wait for each other sleep, not spin: another thread reads meanwhile, and
    other programs have work too. On a busy machine of two processors encoding took a third less time. A user's own
    choice stands."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
