# Several machines on one: network namespaces joined by a bridge, node N with the address 10.77.0.(N + 1).
#
#   unshare -Urn sh nodes.sh COUNT SCRIPT     without rights of any kind; as root `unshare -n` does
#
# SCRIPT is shell, and has `node N COMMAND…`, which runs a command on a node. `ip link set portN down` in it pulls the
# cable of node N. Processes are those of the machine, so anybody may signal them from outside.
set -eu
count=$1

ip link set lo up
ip link add bridge type bridge
ip link set bridge up
n=0
while [ $n -lt "$count" ]; do
    # A namespace lives as long as a process is in it.
    unshare -n sleep infinity </dev/null >/dev/null 2>&1 &
    eval "export pid$n=$!"
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.01; done
    ip link add port$n type veth peer name eth0 netns $!
    ip link set port$n master bridge up
    nsenter -t $! -n sh -euc "ip link set lo up; ip addr add 10.77.0.$((n + 1))/24 dev eth0; ip link set eth0 up"
    n=$((n + 1))
done

node() {
    eval "pid=\$pid$1"
    shift
    nsenter -t "$pid" -n "$@"
}

remove_nodes() {
    n=0
    while [ $n -lt "$count" ]; do
        eval "kill \$pid$n" || true
        n=$((n + 1))
    done
}
trap remove_nodes EXIT

eval "$2"
