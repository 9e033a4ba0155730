"""What tenants used and who changed what: the usage ledger and the audit log. Knows no HTTP and no engine."""
