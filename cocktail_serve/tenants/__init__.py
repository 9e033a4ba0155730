"""Who may use the server: tenants, their keys, what each may do. Knows no HTTP."""
