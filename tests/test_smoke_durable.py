import threading
from datetime import UTC, datetime, timedelta
import pytest, sqlalchemy as sa
import jobkit
from jobkit import JobStore
from tests.test_faults import claim_one

def fresh(engine, job):
    with engine.connect() as c: return JobStore(c).get_by_id(job.id)

def test_retry(engine, disk, create, recorder):
    r = jobkit.Renderers()
    @r.register("note", max_attempts=3)
    def note(ctx):
        if ctx.attempt < 3: raise jobkit.Retry(0)
        return jobkit.Rendered("a.txt", "text/plain", b"x")
    job = create()
    n = 0
    runner = jobkit.Runner(engine, disk, r)
    import time
    d=time.monotonic()+10
    while fresh(engine, job).status != "done" and time.monotonic()<d:
        runner.run_until_idle(timeout=20)
    assert fresh(engine, job).attempt == 3
    assert recorder.types(job.id) == ["queued","running","retrying","running","retrying","running","done"]

def test_rescue(engine, disk, create, recorder):
    job = create()
    claim_one(engine, "dead")
    with engine.begin() as c:
        c.execute(sa.text("update content_jobs set lease_until = :t"), {"t": "2020-01-01 00:00:00.000000" + ("" if engine.dialect.name=="sqlite" else "+00")})
    r = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"x"))
    runner = jobkit.Runner(engine, disk, r)
    assert runner.rescue() == jobkit.RescueReport(queued=1)
    assert runner.run_until_idle(timeout=20) == 1
    j = fresh(engine, job)
    assert (j.status, j.rescues, j.attempt, j.fence) == ("done", 1, 1, 2)
    print(recorder.events)

def test_cancel_running(engine, disk, create, recorder):
    go = threading.Event()
    def slow(ctx):
        go.set()
        import time
        d=time.monotonic()+20
        while time.monotonic()<d: ctx.check(); time.sleep(.01)
        raise ValueError
    runner = jobkit.Runner(engine, disk, jobkit.Renderers(default=slow), lease=1).start()
    job = create(); runner.dispatch(job)
    assert go.wait(10)
    with engine.begin() as c: assert JobStore(c).cancel(job.id).status == "running"
    recorder.wait(lambda t: "cancelled" in t)
    runner.stop()
    j = fresh(engine, job); assert j.status == "cancelled" and j.cancel_requested_at
    with engine.begin() as c: assert JobStore(c).retry(job.id).cancel_requested_at is None

def test_order(engine, disk, create, recorder):
    now = datetime.now(UTC)
    order=[]
    def note(ctx): order.append(ctx.input["n"]); return jobkit.Rendered("a.txt", "text/plain", b"x")
    for n,kw in [("low",{}),("high",{"priority":5}),("future",{"run_at":now+timedelta(hours=1),"priority":9}),("due",{"run_at":now-timedelta(hours=1)}), ("due0",{"run_at":now-timedelta(hours=2)})]:
        create(input={"n":n},**kw)
    assert jobkit.Runner(engine, disk, jobkit.Renderers(default=note), concurrency=1).run_until_idle(timeout=20) == 4
    print(order); assert "future" not in order and order.index("high")<order.index("low") and order.index("due0")<order.index("due")

def test_fair(engine, disk, recorder):
    order=[]
    def note(ctx): order.append(ctx.company_id); return jobkit.Rendered("a.txt", "text/plain", b"x")
    with engine.begin() as c:
        JobStore(c).create_many("a", [jobkit.JobRequest("note")]*60)
        JobStore(c).create_many("b", [jobkit.JobRequest("note")]*3)
        JobStore(c).create_many("c", [jobkit.JobRequest("note")]*3)
    assert jobkit.Runner(engine, disk, jobkit.Renderers(default=note), concurrency=2).run_until_idle(timeout=30) == 66
    print(order); assert max(i for i,c in enumerate(order) if c!="a") < 40

def test_key(engine, create):
    a=create(idempotency_key="k", input={"x":1}); b=create(idempotency_key="k", input={"x":1})
    assert a.id==b.id
    with pytest.raises(jobkit.IdempotencyConflict): create(idempotency_key="k", input={"x":2})
