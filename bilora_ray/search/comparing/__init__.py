"""Methods compared at equal budgets: `bilora-ray compare`. Each of its studies is an ordinary one."""
