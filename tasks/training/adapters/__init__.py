"""What can be added to a frozen base, one method a spec; PEFT adds it, trains it, saves it and loads it."""
