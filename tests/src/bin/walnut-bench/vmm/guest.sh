mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/shm /tmp /mnt

# figure NAME VALUE: what the host reads.
figure() { echo "figure $1 $2"; }

# now: hundredths of a second since the start.
now() { read up rest < /proc/uptime; echo "${up%.*}${up#*.}"; }

# timed NAME COMMAND...: figure in milliseconds.
timed() {
    name=$1; shift; begun=$(now)
    "$@" > /dev/null || echo "failed $name"
    figure "$name" $((($(now) - begun) * 10))
}

# measure NAME FIELD FIO-ARGUMENTS...: a field of fio's terse output, version 3.
measure() {
    name=$1 field=$2; shift 2
    fio --name=bench --thread --output-format=terse --terse-version=3 --filesize=64m "$@" > /tmp/fio 2>&1 ||
        { echo "failed $name"; cat /tmp/fio; }
    figure "$name" "$(tail -n 1 /tmp/fio | cut -d ';' -f "$field")"
}

if [ -b /dev/vda ]; then
    disk="--filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=8"
    measure block.randread 8 $disk --rw=randread --bs=4k --io_size=16m
    measure block.randwrite 49 $disk --rw=randwrite --bs=4k --io_size=16m
    measure block.read 7 $disk --rw=read --bs=1m --io_size=256m
    measure block.write 48 $disk --rw=write --bs=1m --io_size=256m
fi

remount() { umount /mnt 2> /dev/null; mount -t virtiofs walnut /mnt || echo "failed mount"; }
all() { find /mnt/tree -type f -exec cat {} +; }
remount
timed fs.find.cold find /mnt/tree -type f -size +9
timed fs.find.warm find /mnt/tree -type f -size +9
remount
timed fs.read.cold all
timed fs.read.warm all
mkdir -p /mnt/out
timed fs.untar tar xf /mnt/tree.tar -C /mnt/out
rm -rf /mnt/out
remount
file="--filename=/mnt/big --ioengine=psync --bs=1m --io_size=64m"
measure fs.seqread.cold 7 $file --rw=read --invalidate=0
measure fs.seqread.warm 7 $file --rw=read --invalidate=0
measure fs.seqwrite 48 $file --rw=write --end_fsync=1

if [ -d /sys/class/net/eth0 ]; then
ip link set lo up
ip addr add 10.77.0.2/24 dev eth0 && ip link set eth0 up
speed() { iperf3 -c 10.77.0.1 -t 3 -f k "$@" | awk '/receiver/ {print $(NF-2)}'; }
figure net.send "$(speed)"
figure net.receive "$(speed -R)"
figure net.ping "$(ping -A -q -c 200 10.77.0.1 | awk -F/ '/round-trip/ {print $4}')"
fi

socat VSOCK-LISTEN:5000,fork,reuseaddr SYSTEM:'cat >/dev/null; echo done' &
socat VSOCK-LISTEN:5001,fork,reuseaddr EXEC:cat &
socat VSOCK-LISTEN:5002,fork,reuseaddr SYSTEM:'head -c 33554432 /dev/zero' &
while [ "$(cut -d ' ' -f 1 /proc/net/vsock 2> /dev/null; pidof socat | wc -w)" -lt 3 ]; do :; done
echo "the guest serves sockets"
sleep 100000
