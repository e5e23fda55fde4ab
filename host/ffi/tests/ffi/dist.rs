//! Two real processes: the test starts this binary again, asking for `child` alone.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use host_ffi::dist::{Group, Store};
use tch::{Device, Kind, Tensor};

const LOCALHOST: &str = "127.0.0.1";
const PATIENCE: Duration = Duration::from_secs(60);
const CHILD: &str = "HOST_FFI_TEST_CHILD";

fn values(list: &[f32]) -> Tensor {
    Tensor::from_slice(list)
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).reshape([-1])).unwrap()
}

/// Starts rank 1, which plays `part` against the store on `port`.
fn start(part: &str, port: u16) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "dist::child", "--ignored", "--nocapture"])
        .env(CHILD, format!("{part}:{port}"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "the second process of the tests beside it"]
fn child() {
    let part = std::env::var(CHILD).expect("started by a test");
    let (part, port) = part.split_once(':').unwrap();
    let store = Store::connect(LOCALHOST, port.parse().unwrap(), 2, PATIENCE).unwrap();
    let group = Group::join(&store, "test", 1, 2, PATIENCE).unwrap();
    match part {
        "collectives" => collectives(&store, &group),
        "leave" => std::process::exit(0),
        "sleep" => std::thread::sleep(Duration::from_secs(600)),
        other => panic!("unknown part {other}"),
    }
}

/// What both ranks do; each checks its own results.
fn collectives(store: &Store, group: &Group) {
    let rank = group.rank();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double, Kind::Int64] {
        let t = values(&[1.0 + rank as f32, 10.0]).to_kind(kind);
        group.all_reduce_sum(&t).unwrap();
        assert_eq!(numbers(&t), [3.0, 20.0], "{kind:?}");
    }
    let wide = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
    let column = wide.narrow(1, 1, 1);
    let _ = column.shallow_clone().fill_(rank as f64 + 1.0);
    group.all_reduce_sum(&column).unwrap();
    assert_eq!(numbers(&wide), [0.0, 3.0, 0.0, 0.0, 3.0, 0.0], "a view is reduced in place");

    let leaf = values(&[1.0]).set_requires_grad(true);
    group.all_reduce_sum(&leaf).unwrap();
    assert_eq!(numbers(&leaf), [2.0]);

    let t = values(&[rank as f32; 3]);
    group.broadcast(&t, 1).unwrap();
    assert_eq!(numbers(&t), [1.0; 3]);
    assert!(group.broadcast(&t, 2).is_err());

    let gathered = group.all_gather(&values(&[rank as f32, 7.0])).unwrap();
    assert_eq!((gathered.size(), numbers(&gathered)), (vec![2, 2], vec![0.0, 7.0, 1.0, 7.0]));

    // Each starts before the last is waited for; 6 numbers are 24 bytes, of which this rank has half.
    let _ = group.take_bytes_received();
    let whole = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
    let gather = group.all_gather_into(&whole, &values(&[rank as f32, 7.0, 8.0])).unwrap();
    let shard = Tensor::zeros([3], (Kind::BFloat16, Device::Cpu));
    let terms = (Tensor::arange(6, (Kind::Float, Device::Cpu)) * (rank as f64 + 1.0)).to_kind(Kind::BFloat16);
    let scatter = group.reduce_scatter_sum(&shard, &terms).unwrap();
    gather.wait().unwrap();
    scatter.wait().unwrap();
    assert_eq!(numbers(&whole), [0.0, 7.0, 8.0, 1.0, 7.0, 8.0]);
    assert_eq!(numbers(&shard), [[0.0, 3.0, 6.0], [9.0, 12.0, 15.0]][rank]);
    assert_eq!(group.take_bytes_received(), 12 + 6);
    let error = group.all_gather_into(&whole, &shard).unwrap_err();
    assert_eq!(error.0, "a shard of BFloat16 [3] does not make Float [2, 3] with 2 ranks");

    store.set(&format!("from {rank}"), format!("hello from {rank}").as_bytes()).unwrap();
    let other = 1 - rank;
    assert_eq!(store.get(&format!("from {other}"), PATIENCE).unwrap(), format!("hello from {other}").as_bytes());
    store.add("count", 5).unwrap();
    group.barrier().unwrap();
    assert_eq!(store.add("count", 0).unwrap(), 10);
    group.barrier().unwrap();
}

fn meet(part: &str, timeout: Duration) -> (Store, Group, Child) {
    let store = Store::serve(LOCALHOST, 0, 2, PATIENCE).unwrap();
    let child = start(part, store.port());
    let group = Group::join(&store, "test", 0, 2, timeout).unwrap();
    (store, group, child)
}

#[test]
fn two_processes_reduce_broadcast_and_gather() {
    let (store, group, mut child) = meet("collectives", PATIENCE);
    collectives(&store, &group);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_killed_peer_is_an_error_within_seconds() {
    let (_store, group, mut child) = meet("sleep", PATIENCE);
    let begun = Instant::now();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        child.kill().unwrap();
        child.wait().unwrap();
    });
    let error = group.all_reduce_sum(&values(&[1.0])).unwrap_err();
    killer.join().unwrap();
    assert!(error.0.contains("another rank went away during all-reduce"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_peer_that_leaves_is_an_error() {
    let (_store, group, mut child) = meet("leave", PATIENCE);
    assert!(child.wait().unwrap().success());
    assert!(group.all_reduce_sum(&values(&[1.0])).unwrap_err().0.contains("another rank went away"));
}

#[test]
fn a_peer_that_hangs_is_an_error_after_the_timeout() {
    let (_store, group, mut child) = meet("sleep", Duration::from_secs(3));
    let begun = Instant::now();
    let error = group.all_reduce_sum(&values(&[1.0])).unwrap_err();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(error.0.contains("did not take part in all-reduce within 3s"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = Store::serve(LOCALHOST, port, 2, PATIENCE).unwrap_err();
    assert_eq!(error.0, format!("cannot serve the store on 127.0.0.1:{port}: the port is in use"));
}

#[test]
fn nobody_there_is_an_error_after_the_timeout() {
    let free = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let begun = Instant::now();
    let error = Store::connect(LOCALHOST, free, 2, Duration::from_secs(2)).unwrap_err();
    assert!(error.0.starts_with(&format!("cannot reach the store at 127.0.0.1:{free} within 2s: ")), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[test]
fn a_missing_rank_is_an_error_after_the_timeout() {
    let store = Store::serve(LOCALHOST, 0, 2, PATIENCE).unwrap();
    let error = Group::join(&store, "test", 0, 2, Duration::from_secs(2)).unwrap_err();
    assert!(error.0.starts_with("rank 0 of 2 could not join the group `test`: "), "{error}");
}

#[test]
fn a_key_that_never_comes_is_an_error() {
    let store = Store::serve(LOCALHOST, 0, 1, PATIENCE).unwrap();
    assert!(!store.check("absent").unwrap());
    let error = store.get("absent", Duration::from_millis(200)).unwrap_err();
    assert!(error.0.starts_with("cannot get `absent` in the store at 127.0.0.1:"), "{error}");
    store.set("empty", b"").unwrap();
    assert_eq!(store.get("empty", PATIENCE).unwrap(), b"");
}

#[test]
fn a_group_of_one_does_nothing() {
    let store = Store::serve(LOCALHOST, 0, 1, PATIENCE).unwrap();
    for group in [Group::alone(), Group::join(&store, "one", 0, 1, PATIENCE).unwrap()] {
        let t = values(&[4.0]);
        group.all_reduce_sum(&t).unwrap();
        group.broadcast(&t, 0).unwrap();
        group.barrier().unwrap();
        assert_eq!((group.world_size(), numbers(&t)), (1, vec![4.0]));
        assert_eq!(group.all_gather(&t).unwrap().size(), [1, 1]);
    }
    assert!(Group::join(&store, "one", 1, 1, PATIENCE).is_err());
}
