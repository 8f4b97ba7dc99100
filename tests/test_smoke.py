import jobkit


def test_smoke(engine, assets, create, recorder):
    r = jobkit.Renderers()

    @r.register("note")
    def note(ctx):
        return jobkit.Rendered("a.txt", "text/plain", b"x")

    job = create()
    assert jobkit.Runner(engine, assets, r).run_until_idle(timeout=20) == 1
    assert recorder.types(job.id) == ["queued", "running", "done"]
