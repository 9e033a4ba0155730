"""`/docs`: the OpenAPI document as a page. Its script and style come from here: no other host is asked for anything."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse

router = APIRouter(include_in_schema=False)

# every address is relative to the page's, so that it works behind a proxy's prefix, which the server does not know
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>cocktail-serve</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>
fetch("openapi.json").then((answer) => answer.json()).then((spec) => {
  const prefix = new URL(".", location).pathname.slice(0, -1);
  if (prefix) spec.servers = [{url: prefix}];
  SwaggerUIBundle({spec, dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null});
});
</script>
</body>
</html>
"""


@router.get("/docs")
async def docs() -> HTMLResponse:
    """The page."""
    return HTMLResponse(_PAGE)


@router.get("/docs/{name}")
async def docs_file(name: Literal["swagger-ui-bundle.js", "swagger-ui.css"]) -> FileResponse:
    """Swagger UI, as `fastapi-offline` carries it."""
    with as_file(files("fastapi_offline") / "static" / name) as path:
        return FileResponse(path, headers={"cache-control": "max-age=86400"})
