"""Names of objectives."""

from rob.student_train.objectives import OBJECTIVES

OF_VIEWS = tuple(name for name in OBJECTIVES if name != "patch")
"""Those that learn from one target a view; patches have tests of their own."""
