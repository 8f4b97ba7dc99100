"""Reports for every branch of a company, in a FastAPI app with live pages.

    python -m uvicorn examples.fastapi_app.main:app --workers 2

Then open http://127.0.0.1:8000/. ``database.py`` has the tables, ``rendering.py`` makes the files, ``main.py`` serves.
"""
