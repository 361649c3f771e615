//! What stands in a Pod's network namespace, the Pod has: told to Walnut and to runc, the oracle.
//!
//! Each story makes its own namespaces and wires on the node, which stands for the rest of the cluster.

mod plugins;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    thread,
};
use walnut_tests::{
    command,
    ctr::{BUSYBOX, Container, DEBIAN, Run, Runtime},
    deadline::{self, Deadline},
    leak::Leak,
    requirement,
    story::tell,
};

const MIB: usize = 1 << 20;
/// The node's own programs, for a container that has few.
const TOOLS: &str = "--mount=type=bind,src=/usr,dst=/usr,options=rbind:ro";

/// Runs a script on the node, which must end well.
fn node(script: &str) -> Result<String> {
    let mut shell = Command::new("sh");
    shell.args(["-ec", script]);
    let output = command::run(&mut shell, Vec::new(), Deadline::after(deadline::REQUEST))?;
    Ok(output.success().with_context(|| script.to_owned())?.text())
}

/// A network namespace of the node with two wires, and all that can stand in one.
struct Wires(&'static str);

impl Wires {
    fn lay(name: &'static str) -> Result<Self> {
        let wires = Self(name);
        node(&format!(
            "ip netns add {name}; in='ip -n {name}'; $in link set lo up
            ip link add {name}0 type veth peer name eth0 address 02:11:22:33:44:55 netns {name}
            ip link add {name}1 type veth peer name net1 address 02:11:22:33:44:66 netns {name}
            ip link set {name}0 mtu 1400 up; ip link set {name}1 mtu 9000 up
            $in link set eth0 mtu 1400 up; $in link set net1 mtu 9000 up
            ip addr add 10.88.0.1/24 dev {name}0; ip addr add fd88::1/64 dev {name}0 nodad
            ip addr add 10.89.0.1/24 dev {name}1; ip addr add 10.89.0.129/24 dev {name}1
            $in addr add 10.88.0.2/24 dev eth0; $in addr add fd88::2/64 dev eth0 nodad
            $in addr add 10.88.0.3/32 dev eth0; $in addr add 192.0.2.1/32 dev lo
            $in addr add 10.89.0.2/24 dev net1 noprefixroute
            $in route add 10.89.0.0/25 dev net1 src 10.89.0.2 mtu 1300
            $in route add 10.89.0.128/25 dev net1
            $in route add default via 10.88.0.1; $in route add default via fd88::1
            $in route add 172.31.1.0/24 via 10.89.0.1 dev net1 metric 7
            $in route add 172.31.2.0/24 nexthop via 10.88.0.1 weight 1 nexthop via 10.89.0.1 weight 2
            $in route add 198.51.100.9 via 203.0.113.1 dev net1 onlink
            $in route add blackhole 172.31.3.0/24; $in route add unreachable fd99::/64
            $in neigh add 10.89.0.77 lladdr 02:77:77:77:77:77 dev net1 nud permanent
            $in neigh add fd88::77 lladdr 02:77:77:77:77:78 dev eth0 nud permanent
            $in rule add from 10.89.0.2 lookup 100; $in route add default via 10.89.0.1 table 100
            $in -6 rule add to fd99::/64 iif eth0 blackhole"
        ))?;
        // IPv6 addresses of the links are there once nobody has objected to them.
        let settled = format!("ip -n {name} -6 addr show tentative; ip -6 addr show tentative");
        deadline::until("addresses", Deadline::after(deadline::REQUEST), || {
            Ok(node(&settled)?.is_empty().then_some(()))
        })?;
        Ok(wires)
    }

    /// The flag of `ctr run` for a container in this namespace.
    fn flag(&self) -> String {
        format!("--with-ns=network:/run/netns/{}", self.0)
    }

    /// All that somebody could have done to the namespace itself.
    fn state(&self) -> Result<String> {
        let name = self.0;
        node(&format!(
            "ip -n {name} -o link | sed 's/ qlen.*//'; ip -n {name} -o addr; ip -n {name} route show table all
            tc -n {name} qdisc; for d in eth0 net1; do tc -n {name} filter show dev $d ingress; done"
        ))
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        let name = self.0;
        let _ = node(&format!(
            "ip netns del {name}; ip link del {name}0; ip link del {name}1; true"
        ));
    }
}

/// What a container sees of its network. Interfaces have other numbers, and flags say who made an address.
const SEEN: &str = "
    ip -o addr | sed -E 's/^[0-9]+: //; s/ (noprefixroute|nodad|secondary|proto kernel_[a-z]+)//g; s/\\\\.*//' | sort
    for i in /sys/class/net/*; do echo ${i##*/} $(cat $i/mtu $i/address $i/flags); done
    ip route show table all | grep -v 'table local' | sed 's/ linkdown//' | sort
    ip -6 route show table all | grep -v 'table local' | sed 's/ pref medium//' | sort
    ip neigh show nud permanent | sort; ip rule; ip -6 rule";

/// What a container does to the node, whose end of the wire has 10.88.0.1 and fd88::1, and 10.89.0.1.
const DONE: &str = "
    ping -c 2 -i 0.2 -w 30 10.88.0.1 > /dev/null && echo ping; ping -c 1 -w 30 fd88::1 > /dev/null && echo ping6
    ping -c 1 -w 30 10.89.0.1 > /dev/null && echo second; ping -c 1 -w 30 127.0.0.1 > /dev/null && echo loopback
    ping -c 1 -w 30 -M do -s 1372 10.88.0.1 > /dev/null && echo fits
    ping -c 1 -w 30 -M do -s 1373 10.88.0.1 2>&1 | grep -o 'message too long.*'
    ping -c 1 -w 30 -s 40000 10.88.0.1 > /dev/null && echo fragments
    ping -c 1 -w 30 -M do -s 8972 10.89.0.129 > /dev/null && echo jumbo
    ping -c 1 -w 30 -M do -s 1273 10.89.0.1 2>&1 | grep -o 'message too long.*'
    ping -c 1 -w 5 172.31.3.1 2>&1 | grep -oiE 'invalid argument|unreachable'
    ping -6 -c 1 -w 30 ff02::1%eth0 > /dev/null && echo multicast
    head -c 3000000 /dev/zero | socat -t 30 - TCP:10.88.0.1:7007 | wc -c
    head -c 3000000 /dev/zero | socat -t 30 - TCP:[fd88::1]:7007 | wc -c
    head -c 60000 /dev/zero | socat -b 65536 -t 9 - UDP:10.88.0.1:7007 | head -c 60000 | wc -c
    echo | socat - TCP:10.88.0.1:7008 2>&1 | grep -o 'Connection refused'
    echo | socat -T 2 - UDP:10.88.0.1:7008 2>&1 | grep -o 'Connection refused'
    setpriv --bounding-set -net_raw --inh-caps -net_raw ping -c 1 -w 5 127.0.0.1 > /dev/null 2>&1; echo $?";

/// Answers everything with itself, on all that a container has.
const ECHO: &str = "
    socat TCP6-LISTEN:7,fork,reuseaddr,ipv6only=0 EXEC:cat &
    socat -b 65536 UDP6-RECVFROM:7,fork,reuseaddr,ipv6only=0 PIPE &
    socat UDP4-RECVFROM:77,fork,reuseaddr,ip-add-membership=239.1.2.3:eth0 PIPE &
    exec sleep 100000";

/// Echoes on the node, on any of its addresses, until the test ends.
fn serve_node() -> Result<()> {
    let listener = TcpListener::bind("[::]:7007").context("cannot listen")?;
    let socket = UdpSocket::bind("0.0.0.0:7007").context("cannot receive")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    thread::spawn(move || {
        let mut datagram = vec![0; 65536];
        while let Ok((length, peer)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], peer);
        }
    });
    Ok(())
}

/// Sends a MiB to a server that echoes, and looks at what comes back.
fn echoed_by(server: &str) -> Result<()> {
    let address: SocketAddr = server.parse()?;
    let connect = || Ok(TcpStream::connect_timeout(&address, deadline::REQUEST).ok());
    let stream = deadline::until(server, Deadline::after(deadline::REQUEST), connect)?;
    stream.set_read_timeout(Some(deadline::REQUEST))?;
    let sent: Vec<u8> = (0..MIB / 4)
        .flat_map(|at| u32::try_from(at).unwrap_or_default().to_le_bytes())
        .collect();
    let mut writer = stream.try_clone()?;
    let to_send = sent.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&to_send)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut received = Vec::new();
    (&stream).read_to_end(&mut received)?;
    writing.join().expect("the writer does not panic")?;
    ensure!(
        received == sent,
        "{server}: {} bytes came back",
        received.len()
    );
    Ok(())
}

/// Sends a datagram to a server that echoes; a first one may be lost while addresses are looked for.
fn datagram_echoed_by(server: &str, bytes: usize) -> Result<()> {
    let socket = UdpSocket::bind(if server.starts_with('[') {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    })?;
    socket.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
    let sent: Vec<u8> = (0..=250).cycle().take(bytes).collect();
    let mut received = vec![0; 65536];
    let echo = || {
        socket.send_to(&sent, server)?;
        Ok(socket
            .recv(&mut received)
            .ok()
            .filter(|length| received[..*length] == sent))
    };
    deadline::until(server, Deadline::after(deadline::REQUEST), echo)?;
    Ok(())
}

fn networked(runtime: Runtime, image: &str, flag: &str) -> Run {
    runtime.run(image).flag(flag)
}

struct Wired {
    wires: Wires,
    container: Container,
}

#[test]
fn a_pods_network_is_as_runc_has_it() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    serve_node()?;
    let leak = Leak::watch()?;
    let mut seen = Vec::new();
    let mut done = Vec::new();
    for runtime in [Runtime::Runc, Runtime::Walnut] {
        let wires = Wires::lay("wtwire")?;
        let before = wires.state()?;
        let run = networked(runtime, DEBIAN, &wires.flag()).flag(TOOLS);
        let container = match runtime {
            Runtime::Runc => run.shell(ECHO),
            // Of its own kernel; runc's would be the node's administrator.
            Runtime::Walnut => run
                .flag("--cap-add=CAP_NET_ADMIN")
                .flag("--cap-add=CAP_SYS_ADMIN")
                .shell(ECHO),
        };
        let container = container.detach()?;
        seen.push(container.shell(SEEN)?.success()?.text());
        done.push(container.shell(DONE)?.text());
        let mut wired = Wired { wires, container };
        let mut chapters: Vec<walnut_tests::story::Chapter<Wired>> = vec![
            ("the node reaches the Pod", node_reaches_pod),
            ("rules on the node hold", rules_on_the_node),
        ];
        if runtime == Runtime::Walnut {
            chapters.push(("an administrator has the guest's network", administers));
            chapters.push(("changes arrive", changes_arrive));
        }
        let told = tell(&mut wired, &chapters).with_context(|| format!("{runtime:?}"));
        if runtime == Runtime::Walnut {
            wired.container.kill("SIGKILL")?;
            wired.container.wait_for("STOPPED")?;
            wired.container.task_status()?;
            wired.container.remove()?;
            told?;
            let after = wired.wires.state()?;
            ensure!(before == after, "before: {before}\nafter: {after}");
        } else {
            told?;
        }
    }
    same_lines(&seen)?;
    same_lines(&done)?;
    leak.nothing_left()
}

/// What runc's container and Walnut's said, in this order.
fn same_lines(said: &[String]) -> Result<()> {
    let only = |these: &str, those: &str| {
        let those: Vec<&str> = those.lines().collect();
        let missing = these.lines().filter(|line| !those.contains(line));
        missing.map(str::to_owned).collect::<Vec<_>>()
    };
    let [runc, walnut] = said else {
        anyhow::bail!("{said:?}")
    };
    println!("{walnut}");
    ensure!(
        walnut == runc,
        "only with walnut: {:#?}\nonly with runc: {:#?}",
        only(walnut, runc),
        only(runc, walnut)
    );
    Ok(())
}

fn node_reaches_pod(_: &mut Wired) -> Result<()> {
    for server in ["10.88.0.2:7", "10.88.0.3:7", "10.89.0.2:7", "[fd88::2]:7"] {
        echoed_by(server)?;
    }
    for server in ["10.88.0.2:7", "10.89.0.2:7", "[fd88::2]:7"] {
        datagram_echoed_by(server, 60_000)?;
    }
    node(
        "ping -c 1 -w 30 10.88.0.2; ping -c 1 -w 30 -s 20000 fd88::2; ip route replace 239.1.2.3 dev wtwire0",
    )?;
    datagram_echoed_by("239.1.2.3:77", 100)
}

/// A policy is a rule on the node's end of the wire, and a published port a translation before it.
fn rules_on_the_node(wired: &mut Wired) -> Result<()> {
    node(
        "nft -f - <<'END'
        table inet wtpolicy {
            chain input {
                type filter hook input priority 0
                iifname wtwire0 tcp dport 7007 counter reject with tcp reset
            }
            chain publish {
                type nat hook output priority dstnat
                ip daddr 10.88.0.1 tcp dport 8088 dnat ip to 10.88.0.2:7
            }
        }
END",
    )?;
    let refused = wired
        .container
        .shell("echo | socat - TCP:10.88.0.1:7007 2>&1");
    let published = echoed_by("10.88.0.1:8088");
    let counted = node("nft list table inet wtpolicy | grep -c 'packets [1-9]'");
    node("nft delete table inet wtpolicy")?;
    let refused = refused?.text();
    ensure!(refused.contains("Connection refused"), "{refused}");
    ensure!(counted?.trim() == "1", "no packet came by the policy");
    published
}

/// What Docker in a Pod and service meshes need, in the guest's own kernel.
fn administers(wired: &mut Wired) -> Result<()> {
    let script = "set -e
        nft -f - <<'END'
        table ip nat {
            chain output { type nat hook output priority -100; ip daddr 10.99.9.9 tcp dport 1 dnat to 10.88.0.1:7007; }
            chain post { type nat hook postrouting priority 100; ip saddr 10.7.0.0/24 masquerade; }
        }
END
        echo through | socat -t 30 - TCP:10.99.9.9:1
        umask 077; wg genkey > /tmp/key; ip link add wg0 type wireguard; wg set wg0 private-key /tmp/key listen-port 5555
        ip addr add 10.6.0.1/24 dev wg0; ip link set wg0 up; wg show wg0 | grep -c 'listening port: 5555'
        ip link add br0 type bridge; ip addr add 10.7.0.1/24 dev br0; ip link set br0 up
        ip link add in0 type veth peer name out0; ip link set out0 master br0; ip link set out0 up
        unshare -n sleep 1000 & until ip link set in0 netns $!; do :; done 2> /dev/null
        nsenter -n -t $! sh -ec 'ip addr add 10.7.0.2/24 dev in0; ip link set in0 up; ip route add default via 10.7.0.1
            ping -c 1 -w 30 10.7.0.1' > /dev/null; echo bridged; kill $!";
    let said = wired.container.shell(script)?.success()?.text();
    ensure!(said == "through\n1\nbridged", "{said}");
    Ok(())
}

/// The namespace changes while the Pod runs.
fn changes_arrive(wired: &mut Wired) -> Result<()> {
    let name = wired.wires.0;
    node(&format!(
        "ip -n {name} addr add 10.88.0.9/24 dev eth0; ip -n {name} link set net1 mtu 1280"
    ))?;
    echoed_by("10.88.0.9:7")?;
    let mtu = || {
        Ok((wired.container.shell("cat /sys/class/net/net1/mtu")?.text() == "1280").then_some(()))
    };
    deadline::until("the new MTU", Deadline::after(deadline::REQUEST), mtu)?;
    node(&format!(
        "ip -n {name} addr del 10.88.0.9/24 dev eth0; ip -n {name} link set net1 mtu 9000"
    ))?;
    let gone = || {
        Ok((!wired
            .container
            .shell("ip -o addr")?
            .text()
            .contains("10.88.0.9/"))
        .then_some(()))
    };
    deadline::until("an address to go", Deadline::after(deadline::REQUEST), gone)
}
