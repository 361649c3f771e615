//! The network device with a real guest kernel and a real tap: what comes through, and what happens when it is
//! taken apart.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    net::UdpSocket,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use walnut_tests::{
    command,
    deadline::{self, Deadline},
    initramfs::Initramfs,
    network::Network,
    programs::Programs,
    requirement,
    story::{self, Chapter},
    vmm::{Vm, VmBuilder},
};
use walnut_vmm_api::{FailureKind, Message, RateLimit, Request, TokenBucket, VmmExit};

/// Each guest runs what comes on port 1000, and answers with what that says.
const SERVES: &str = "
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
    mkdir -p /tmp; echo 'DATA' > /data
    cat > /setup <<'END'
    ip link set lo up
    echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
    ip addr add 10.77.0.2/24 dev eth0; ip addr add fd77::2/64 dev eth0; ip link set eth0 up
    if [ -e /sys/class/net/eth1 ]; then
        ip addr add 10.78.0.2/24 dev eth1; ip link set eth1 up
    fi
END
    sh /setup
    socat -t 100 TCP-LISTEN:1000,reuseaddr,fork EXEC:'sh' &
    socat -t 100 TCP-LISTEN:1001,reuseaddr,fork EXEC:md5sum &
    socat -t 100 -U TCP-LISTEN:1002,reuseaddr,fork EXEC:'sh /data' &
    iperf3 -s -D
    socat -b 65507 UDP4-RECVFROM:1003,fork PIPE &
    echo guest-is-up; sleep 100000";

/// A command for at least so many bytes: numbered lines, again and again. Nothing cuts them off: who writes to a reader
/// that is gone may go on for ever where SIGPIPE is ignored.
fn data(bytes: u64) -> String {
    // 20,000 lines have more than 100,000 bytes.
    let rounds = bytes / 100_000 + 1;
    format!("lines=\"$(seq 1 20000)\"; for i in $(seq {rounds}); do echo \"$lines\"; done")
}

/// What is sent to the fast network and from it.
const LARGE_BYTES: u64 = 16 * MIB;
const SMALL_BYTES: u64 = MIB;
const FAST: &str = "10.77.0.2";
const SLOW: &str = "10.78.0.2";
const MIB: u64 = 1 << 20;

/// Programs of the guest beside busybox.
const PROGRAMS: [&str; 3] = ["socat", "ethtool", "iperf3"];

struct Networked {
    vm: Vm,
    vhost: bool,
    _directory: TempDir,
}

fn initramfs(directory: &TempDir, programs: &Programs) -> Result<PathBuf> {
    let script = SERVES.replace("DATA", &data(LARGE_BYTES));
    let path = directory.path().join("initramfs");
    let archive = Initramfs::script_with(&programs.busybox, &PROGRAMS, &script)?;
    fs::write(&path, archive)?;
    Ok(path)
}

fn host_with(script: &str, input: &str) -> Result<String> {
    let mut bash = Command::new("bash");
    bash.args(["-o", "pipefail", "-c", script]);
    let deadline = Deadline::after(deadline::BOOT);
    let output = command::run(&mut bash, input.as_bytes().to_vec(), deadline)?;
    let output = output.success().with_context(|| script.to_owned())?;
    Ok(output.text())
}

fn host(script: &str) -> Result<String> {
    host_with(script, "")
}

/// Runs a script in the guest, reached at this address.
fn guest(address: &str, script: &str) -> Result<String> {
    let connect = format!("socat -t 100 - TCP:{address}:1000,retry=100,interval=0.2");
    let said = host_with(&connect, &format!("exec 2>&1\n{script}\n"))?;
    println!("guest> {script}\n{said}");
    Ok(said)
}

fn says(text: &str, expected: &str) -> Result<()> {
    let squeezed = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let found = text.lines().any(|line| squeezed(line) == expected);
    ensure!(found, "no line {expected:?} in: {text}");
    Ok(())
}

fn start(programs: &Programs, vhost: bool) -> Result<Networked> {
    let directory = TempDir::new()?;
    let bytes = TokenBucket {
        size: MIB,
        refill_ms: 1000,
    };
    let fast = Network {
        queues: 2,
        mtu: 9000,
        vhost,
        ..Network::new("wnfast")
    };
    let slow = Network {
        transmit_rate: Some(RateLimit {
            bytes: Some(bytes),
            operations: None,
        }),
        ..Network::new("wnslow")
    };
    let mut vm = VmBuilder::with_initramfs(programs, &initramfs(&directory, programs)?)
        .vcpus(2)
        .memory_mib(256)
        .network(fast)
        .network(slow)
        .start()?;
    vm.expect(&Message::Booted)?;
    host(
        "ip link set wnfast mtu 9000 up; ip addr add 10.77.0.1/24 dev wnfast
        ip addr add fd77::1/64 dev wnfast nodad
        ip link set wnslow up; ip addr add 10.78.0.1/24 dev wnslow",
    )?;
    vm.wait_for_console("guest-is-up")?;
    Ok(Networked {
        vm,
        vhost,
        _directory: directory,
    })
}

#[test]
fn packets_of_every_kind_come_through() -> Result<()> {
    tell_all(false)
}

#[test]
fn packets_of_every_kind_come_through_the_kernel() -> Result<()> {
    tell_all(true)
}

fn tell_all(vhost: bool) -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    if vhost {
        host("modprobe vhost_net")?;
    }
    let mut networked = start(&programs, vhost)?;
    let told = story::tell(&mut networked, CHAPTERS);
    if told.is_err() {
        println!("console: {}", networked.vm.console());
    }
    told?;
    networked.vm.ask(&Request::Stop)?;
    let ended = networked.vm.wait()?;
    ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    let left = host("ip -o link show | grep -c wn || true")?;
    ensure!(left == "0", "{left} taps are left");
    Ok(())
}

const CHAPTERS: &[Chapter<Networked>] = &[
    ("both ends answer", both_ends_answer),
    ("the guest sees what was agreed on", guest_sees_agreement),
    ("16 MiB arrive whole each way", sums_are_equal),
    ("a large datagram comes back", large_datagrams),
    ("the largest packet is the MTU's", mtu_holds),
    ("queues come and go", queues_change),
    ("offloads are switched", offloads_are_switched),
    ("a driver comes back", driver_comes_back),
    ("a rate is kept", rate_is_kept),
    ("a deleted tap ends nothing else", tap_is_deleted),
];

fn both_ends_answer(_: &mut Networked) -> Result<()> {
    host("ping -c 3 -W 20 10.77.0.2 && ping -c 3 -W 20 fd77::2 && ping -c 3 -W 20 10.78.0.2")?;
    let said = guest(
        FAST,
        "ping -c 3 10.77.0.1; ping -6 -c 3 fd77::1; ping -c 3 10.78.0.1",
    )?;
    let received = "3 packets transmitted, 3 packets received, 0% packet loss";
    let count = said.lines().filter(|line| *line == received).count();
    ensure!(count == 3, "{said}");
    Ok(())
}

fn guest_sees_agreement(_: &mut Networked) -> Result<()> {
    let said = guest(
        FAST,
        "ethtool -K eth0 tx-udp-segmentation on
        ethtool -k eth0; ethtool -l eth0; cat /sys/class/net/eth0/address
        echo mtu $(cat /sys/class/net/eth0/mtu) $(cat /sys/class/net/eth1/mtu)
        echo carrier $(cat /sys/class/net/eth0/carrier)
        dmesg | grep -iE 'call trace|bug:|unable to handle' && echo complaints",
    )?;
    for expected in [
        "tx-checksumming: on",
        "tx-tcp-segmentation: on",
        "tx-tcp6-segmentation: on",
        "tx-udp-segmentation: on",
        "rx-checksumming: on [fixed]",
        "rx-gro-hw: on",
        "Combined: 2",
        "02:00:00:00:00:00",
        "mtu 9000 1500",
        "carrier 1",
    ] {
        says(&said, expected)?;
    }
    ensure!(!said.contains("complaints"), "{said}");
    Ok(())
}

fn sums_are_equal(_: &mut Networked) -> Result<()> {
    let large = data(LARGE_BYTES);
    let sum = host(&format!("{large} | md5sum"))?;
    let start = Instant::now();
    let there = host(&format!("{large} | socat -t 100 - TCP:{FAST}:1001"))?;
    let back = Instant::now();
    ensure!(there == sum, "to the guest: {there}, not {sum}");
    let here = host(&format!("socat -u TCP:{FAST}:1002 - | md5sum"))?;
    println!(
        "16 MiB to the guest in {:?}, from it in {:?}",
        back - start,
        back.elapsed()
    );
    ensure!(here == sum, "from the guest: {here}, not {sum}");
    let small = data(SMALL_BYTES);
    let sum = host(&format!("{small} | md5sum"))?;
    let there = host(&format!("{small} | socat -t 100 - TCP:{SLOW}:1001"))?;
    ensure!(there == sum, "to the slow network: {there}, not {sum}");
    Ok(())
}

fn large_datagrams(_: &mut Networked) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let datagram: Vec<u8> = (0..60_000_u32)
        .flat_map(|at| at.to_le_bytes())
        .take(60_000)
        .collect();
    let mut answer = vec![0; 65536];
    // Datagrams may be lost.
    for _ in 0..5 {
        socket.send_to(&datagram, (FAST, 1003))?;
        if let Ok(bytes) = socket.recv(&mut answer) {
            ensure!(answer[..bytes] == datagram, "{bytes} other bytes came back");
            return Ok(());
        }
    }
    bail!("no datagram came back")
}

fn mtu_holds(_: &mut Networked) -> Result<()> {
    host("ping -c 2 -W 20 -M do -s 8972 10.77.0.2")?;
    let said = guest(FAST, "ip link set eth0 mtu 9001; echo status $?")?;
    says(&said, "status 1").or_else(|_| says(&said, "status 2"))
}

fn queues_change(_: &mut Networked) -> Result<()> {
    let flows = format!("for i in 1 2 3 4 5 6 7 8; do ping -c 1 -W 20 {FAST}; done");
    for pairs in [1, 2, 1, 2] {
        let said = guest(
            SLOW,
            &format!("ethtool -L eth0 combined {pairs}; ethtool -l eth0 | tail -n 2"),
        )?;
        says(&said, &format!("Combined: {pairs}"))?;
        host(&flows)?;
        let many = "for i in 1 2 3 4 5 6 7 8; do echo $i; done | md5sum";
        for _ in 0..4 {
            let (there, here) = (guest(FAST, many)?, host(many)?);
            ensure!(there == here, "{there}, not {here}");
        }
    }
    let said = guest(
        FAST,
        "for cpu in 1 2; do taskset $cpu ping -c 3 10.77.0.1; done | grep -c '0% packet loss'
        ethtool -S eth0 | grep -E '(rx|tx)_queue_[01]_(rx_|tx_|)packets'",
    )?;
    says(&said, "2")
}

fn offloads_are_switched(_: &mut Networked) -> Result<()> {
    let small = data(SMALL_BYTES);
    let transfer = format!("{small} | socat -t 100 - TCP:{FAST}:1001");
    let sum = host(&format!("{small} | md5sum"))?;
    for state in ["off", "on"] {
        let said = guest(
            SLOW,
            &format!("ethtool -K eth0 rx-gro-hw {state} tso {state}; ethtool -k eth0"),
        )?;
        says(&said, &format!("rx-gro-hw: {state}"))?;
        says(&said, &format!("tcp-segmentation-offload: {state}"))?;
        ensure!(host(&transfer)? == sum, "with offloads {state}");
    }
    Ok(())
}

fn driver_comes_back(_: &mut Networked) -> Result<()> {
    for _ in 0..3 {
        guest(
            SLOW,
            "cd /sys/bus/virtio/drivers/virtio_net
            device=$(basename $(readlink -f /sys/class/net/eth0/device))
            echo $device > unbind; echo $device > bind; sh /setup 2>/dev/null",
        )?;
        host("ping -c 2 -W 20 10.77.0.2")?;
    }
    let sum = host(&format!("{} | md5sum", data(LARGE_BYTES)))?;
    let here = host(&format!(
        "socat -u TCP:{FAST}:1002,retry=50,interval=0.2 - | md5sum"
    ))?;
    ensure!(here == sum, "from the guest: {here}, not {sum}");
    Ok(())
}

fn rate_is_kept(_: &mut Networked) -> Result<()> {
    let start = Instant::now();
    let ask = format!("socat -t 100 - TCP:{SLOW}:1000 | wc -c");
    let bytes = host_with(&ask, "head -c 5242880 /dev/zero")?;
    ensure!(bytes == "5242880", "{bytes} bytes came");
    // A full bucket and one packet go at once.
    let least = Duration::from_millis(3900);
    ensure!(start.elapsed() >= least, "{:?}", start.elapsed());
    Ok(())
}

fn tap_is_deleted(networked: &mut Networked) -> Result<()> {
    host("ip link del wnfast")?;
    let deadline = Deadline::after(deadline::REQUEST);
    deadline::until("the link's end", deadline, || {
        let look = "ping -c 1 -W 1 10.77.0.1; echo carrier $(cat /sys/class/net/eth0/carrier)";
        let said = guest(SLOW, look)?;
        // The host's kernel doesn't tell the VMM.
        let expected = if networked.vhost {
            "carrier 1"
        } else {
            "carrier 0"
        };
        Ok(says(&said, expected).ok())
    })
}

#[test]
fn what_is_no_tap_with_headers_is_refused() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let cases = [
        (
            Network {
                header: false,
                ..Network::new("wnplain")
            },
            "IFF_VNET_HDR",
        ),
        (
            Network {
                device: "/dev/null".into(),
                ..Network::new("none")
            },
            "TUNGETIFF",
        ),
    ];
    for (network, reason) in cases {
        let ended = VmBuilder::probe(&programs)
            .network(network)
            .start()?
            .wait()?;
        ended.ends_with(VmmExit::Setup)?.says_at_most(1)?;
        let [Message::Failed { kind, error }] = &ended.messages[..] else {
            bail!("expected one failure: {ended:?}");
        };
        ensure!(
            *kind == FailureKind::Internal && error.contains(reason),
            "{error}"
        );
    }
    Ok(())
}
