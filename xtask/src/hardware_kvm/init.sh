#!/bin/busybox sh
# The init of the machine that `cargo xtask test --hardware-kvm` boots: mounts the host's root, read-only and with an overlay in
# memory, runs each test of /plan in it, and says on the second serial port what became of it (see report.rs).
#
# A line of /plan: seconds that the test may take, working directory, program, name of the test; separated by tabs.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/null >/dev/console 2>&1
stty -F /dev/ttyS1 raw
exec 3>/dev/ttyS1

give_up() {
    echo "shoal: error $1" >&3
    poweroff -f
}

while read -r module options; do
    # shellcheck disable=SC2086 # several options are several words
    insmod "/modules/$module.ko" $options || give_up "cannot load the kernel module $module"
done </modules/order
[ -c /dev/kvm ] || give_up "no /dev/kvm"

mkdir -p /host /memory /root
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,ro,cache=loose host /host || give_up "cannot mount the host's root"
mount -t tmpfs -o size=80% memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /root || give_up "no overlay"
for directory in proc sys dev; do
    mount --bind "/$directory" "/root/$directory"
done
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts devpts /root/dev/pts
mount -t tmpfs shm /root/dev/shm
mount -t tmpfs run /root/run
mkdir /root/run/tests
ip link set lo up
hostname hardware-kvm
ulimit -n 65536

uptime() {
    read -r now _ </root/proc/uptime
    echo "$now"
}

set --
while read -r variable; do
    set -- "$@" "$variable"
done </environment

# Tests of one run are strangers to each other: none finds files or processes of the one before.
clean_up() {
    kill -KILL -1
    umount -l /root/run/tests 2>/dev/null
    mount -t tmpfs tests /root/run/tests
}

echo "shoal: ready $(uptime) $(cat /root/sys/devices/system/clocksource/clocksource0/current_clocksource)" >&3
number=0
while IFS='	' read -r limit directory program name; do
    clean_up
    echo "shoal: start $number" >&3
    start=$(uptime)
    : >/output
    # shellcheck disable=SC2016 # for the shell inside
    chroot /root /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/run/tests TMPDIR=/run/tests \
        LANG=C.UTF-8 RUST_BACKTRACE=1 "$@" sh -c 'cd "$1" && exec "$2" --exact "$3" --nocapture' sh "$directory" "$program" "$name" \
        >>/output 2>&1 </dev/null &
    test=$!
    {
        sleep "$limit"
        echo "shoal: late" >&3
        {
            echo
            echo "Its processes then:"
            ps -o pid,ppid,stat,args | grep -v '\]$'
        } >>/output 2>&1
        kill -KILL $test
    } &
    wait $test
    status=$?
    [ $status = 0 ] || tail -n 400 /output | sed 's/^/| /' >&3
    echo "shoal: end $number $status $start $(uptime)" >&3
    number=$((number + 1))
done </plan
clean_up
echo "shoal: done" >&3
poweroff -f
