"""first look"""
import sys, os, json, time, statistics
sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
if len(sys.argv) > 1 and sys.argv[1] == "worker":
    import torch, torch.distributed as dist
    torch.set_num_threads(1)
    from coterie.comm.gloo import schedule_as_batch
    if os.environ.get("BATCH","1")=="1": schedule_as_batch()
    from datetime import timedelta
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    from coterie.comm.exchange.overlapped import OverlappedExchange
    from coterie.comm.exchange.all_to_all import AllToAllExchange
    from coterie.moe.experts import Experts, ExpertsConfig
    from coterie.comm.axis import expert_parallel
    from coterie.moe.assignment import from_choices
    g = dist.group.WORLD; rank, world = dist.get_rank(), dist.get_world_size()
    E,K,T,D,F = json.loads(sys.argv[2]); 
    axes = expert_parallel(g)
    experts = Experts(D, ExpertsConfig(count=E, hidden=F), axes.ep)
    for p in experts.parameters(): torch.nn.init.normal_(p, std=0.02)
    contenders = {"plain": AllToAllExchange(g)}
    for pieces in (1,2,4,8):
        for ahead in (2, 99):
            contenders[f"overlap p{pieces} a{ahead}"] = OverlappedExchange(g, pieces=pieces, ahead=ahead)
    gen = torch.Generator().manual_seed(rank)
    times = {n: ([],[]) for n in contenders}
    rounds = int(sys.argv[3])
    # compute alone: all rows on own experts; comm alone
    def comp():
        x=torch.randn(T*K, D); load=torch.full((E//world,), T*K//(E//world), dtype=torch.int64)
        s=time.perf_counter(); experts.forward(x, load); return time.perf_counter()-s
    def comm():
        x=torch.randn(T*K, D); y=torch.empty_like(x); sp=[T*K//world]*world
        dist.barrier(); s=time.perf_counter(); dist.all_to_all_single(y,x,sp,sp); dist.all_to_all_single(x,y,sp,sp); return time.perf_counter()-s
    with torch.no_grad():
        c=[comp() for _ in range(5)]; m=[comm() for _ in range(5)]
    if rank==0: print(f"compute {statistics.median(c)*1e3:.0f} ms, communication {statistics.median(m)*1e3:.0f} ms")
    for r in range(-1, rounds):
        for n, ex in contenders.items():
            x = torch.randn(T, D, generator=gen).requires_grad_()
            e = torch.rand(T, E, generator=gen).topk(K).indices
            w = torch.full((T,K), 1/K, requires_grad=True)
            a = from_choices(e, w, E)
            dist.barrier()
            s=time.perf_counter(); y=experts.over(ex, x, a); dist.barrier(); t1=time.perf_counter()-s
            dy=torch.randn_like(y)
            dist.barrier()
            s=time.perf_counter(); y.backward(dy); dist.barrier(); t2=time.perf_counter()-s
            if r>=0: times[n][0].append(t1); times[n][1].append(t2)
    if rank==0:
        b=[statistics.median(v) for v in times["plain"]]
        for n,(f,bw) in times.items():
            f,bw=statistics.median(f),statistics.median(bw)
            print(f"{n:18s} fwd {f*1e3:7.0f} ms {b[0]/f:5.2f}x   bwd {bw*1e3:7.0f} ms {b[1]/bw:5.2f}x")
    dist.destroy_process_group()
    sys.exit()
from benchmarks.hosts import hosts, shape
n=int(sys.argv[1]); rate=float(sys.argv[2]); dims=sys.argv[3]; rounds=sys.argv[4]
with hosts(n) as hs:
    shape(hs, rate or None)
    ps=[h.start([sys.executable, __file__, "worker", dims, rounds], h.number%2, {"RANK":str(h.number),"WORLD_SIZE":str(n),"MASTER_ADDR":hs[0].address,"MASTER_PORT":"29511","GLOO_SOCKET_IFNAME":"eth0","OMP_NUM_THREADS":"1","PYTHONPATH":str(__import__("pathlib").Path(__file__).resolve().parents[1])}) for h in hs]
    for p in ps:
        o,e=p.communicate(timeout=500)
        if p.returncode: print(e[-2000:])
        print(o, end="")
