print("--json")
