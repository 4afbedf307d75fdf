"""The guarantees as programs: audits, exact enumeration, statistical tests."""
