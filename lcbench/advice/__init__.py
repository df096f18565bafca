"""What predictions and results come to for somebody who has to choose: sizes, rankings, races, and flags of frameworks."""
