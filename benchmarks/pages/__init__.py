"""Pages whose figures and numbers a script makes."""
